"""How trajectories are sampled."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..engines.engine import SamplingParams
from ..messages.history import HistoryRewriter, resolve_rewriter
from ..tools.base import tool_version
from .calls.parsers import ToolParserLike, describe_tool_parser, resolve_tool_parser
from .dialects.choice import describe_dialect, resolve_dialect
from .dialects.dialect import DialectLike


@dataclass
class RolloutConfig:
    """Configuration of the rollout loop. Defaults are those of the M-DPO paper (2409.02392, section 3.1).

    It is a plain dataclass, so [`~trl.TrlParser`] reads it from a command line or a YAML file. Trainers'
    configurations have a `seed`, too, and a parser takes each name once; a script that parses both leaves this one
    out, and sets it:

    ```python
    @dataclass
    class RolloutArguments(RolloutConfig):
        seed: int = field(default=0, init=False)  # `--seed` is the trainer's


    parser = TrlParser((ScriptArguments, MultiTurnDPOConfig, ModelConfig, RolloutArguments))
    script_args, training_args, model_args, rollout_args = parser.parse_args_and_config()
    rollout_args.seed = training_args.seed
    ```
    """

    num_generations: int = field(default=30, metadata={"help": "Trajectories per prompt, over all policies (N)."})
    previous_policy_generations: int | None = field(
        default=None,
        metadata={
            "help": "How many of `num_generations` the previous iteration's policy samples (mixture sampling); by "
            "default a third (10 of 30 in the paper). Only the online loop reads it."
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature; 0 decodes greedily."})
    temperature_variants: list[float] = field(
        default_factory=list,
        metadata={
            "help": "Further temperatures, for exploration: the samples of a prompt take `temperature` and these in "
            "turn."
        },
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1.0 is off."})
    top_k: int = field(default=0, metadata={"help": "Samples from the k likeliest tokens; 0 is off."})
    min_p: float = field(
        default=0.0, metadata={"help": "Leaves out tokens below this share of the likeliest one's probability."}
    )
    max_tool_calling_iterations: int = field(
        default=6,
        metadata={
            "help": "Most rounds of tool calls per trajectory (H). A turn that calls tools after the last round ends "
            "the trajectory with `StopReason.MAX_TURNS`; its calls are not run."
        },
    )
    max_turn_tokens: int = field(default=512, metadata={"help": "Most tokens sampled in one turn."})
    max_trajectory_tokens: int = field(
        default=2048, metadata={"help": "Most tokens of prompt and completion together, observations included."}
    )
    stop_strings: list[str] = field(
        default_factory=list,
        metadata={"help": "Strings that end a turn, in addition to the dialect's own."},
    )
    dialect: DialectLike = field(
        default="auto",
        metadata={
            "help": "How the policy calls tools. `native`: the chat template's tool calls. `fenced`: the paper's "
            "format, a fenced code block answered by a user turn with an `output` block. "
            "`hermes`: JSON in tags and a description of the tools, for chat templates that show no calls. "
            "`action`: a text environment's, where every turn is an action. `auto`: native where the "
            "chat template can render and parse tool calls, else fenced. Also the dotted path of a dialect's class "
            "of your own (`my_package.MyDialect`); in Python the class or an object, too (see "
            "`trl_multiturn.rollout.dialects`)."
        },
    )
    tool_parser: ToolParserLike = field(
        default=None,
        metadata={
            "help": "What reads native tool calls. By default it is chosen by round trip among TRL's response "
            "templates and the format that is learned from the chat template. Also a name from vLLM's registry of "
            "tool parsers, where vLLM is installed (`hermes`, `kimi_k2`), or the dotted path of a function "
            "`(text, tools)` that returns a turn's calls; in Python the function, too."
        },
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that marks a turn as the final answer. By default, in the fenced dialect a "
            "`\\boxed{}` with something in it, after the last code; any text without a tool call in the native one; "
            "and none in the dialect `action`."
        },
    )
    action_prefix: str = field(
        default="Action:",
        metadata={
            "help": "What stands before the action in the dialect `action`; empty: the whole turn is the action."
        },
    )
    malformed_calls: Literal["observe", "end"] = field(
        default="observe",
        metadata={
            "help": "What follows a call that cannot be read (an unclosed code block, broken JSON): `observe` tells "
            "the policy what was wrong and lets it go on, `end` ends the trajectory with `StopReason.ENDED`."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message for prompts that have none of their own."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Passed on to the chat template (a dict, or JSON), e.g. `{"enable_thinking": false}`.'},
    )
    earlier_turns: Literal["rendered", "as_sampled"] = field(
        default="rendered",
        metadata={
            "help": "What the policy reads of its earlier turns where the chat template rewrites them (it strips "
            "their thinking). `rendered`: what the template makes of them; the trajectory is then several token "
            "sequences. `as_sampled`: what was sampled."
        },
    )
    rewrite_history: HistoryRewriter | str | None = field(
        default=None,
        metadata={
            "help": "A function `rewrite_history(messages) -> messages`, or its dotted path, that is given all that "
            "the policy is about to read after each answer of a tool, and returns what it reads instead (a summary, "
            "fewer observations, another agent's prompt). Where it changes something, a new token sequence begins."
        },
    )
    seed: int = field(
        default=0,
        metadata={
            "help": "Every turn of every trajectory has a seed of its own, derived from this one and its place."
        },
    )
    tool_timeout_seconds: float | None = field(
        default=30.0,
        metadata={
            "help": "Longest wait for an environment, or for a function without an attribute `timeout_seconds` of its "
            "own. Session tools such as `PythonTool` keep their own limit, which does not run while a call queues for "
            "a core."
        },
    )
    tool_retries: int = field(
        default=2, metadata={"help": "How often a call is tried again after a failure of the machine."}
    )
    max_tool_failure_share: float = field(
        default=0.1,
        metadata={
            "help": "The run stops with an error when more than this share of the finished trajectories (of 20 or "
            "more) met a failure of the machine, or of a reward function that raised. 1.0 never stops."
        },
    )
    max_concurrent_trajectories: int = field(
        default=256, metadata={"help": "Trajectories under way at the same time."}
    )
    max_concurrent_tools: int = field(default=64, metadata={"help": "Tool calls that run at the same time."})

    @classmethod
    def of(cls, config: Any) -> RolloutConfig:
        """What was passed as `config`, or the defaults.

        Raises:
            `TypeError`: if it is no [`RolloutConfig`].
        """
        if config is None:
            return cls()
        if not isinstance(config, RolloutConfig):
            raise TypeError(f"`config` is a {type(config).__name__}. Pass a `RolloutConfig`, or nothing.")
        return config

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.malformed_calls not in ("observe", "end"):
            raise ValueError(f"`malformed_calls={self.malformed_calls!r}` is none of 'observe', 'end'.")
        self._check_dialect()
        resolve_rewriter(self.rewrite_history)
        if self.earlier_turns not in ("rendered", "as_sampled"):
            raise ValueError(f"`earlier_turns={self.earlier_turns!r}` is none of 'rendered', 'as_sampled'.")
        if (self.previous_policy_generations or 0) > self.num_generations:
            raise ValueError(
                f"`previous_policy_generations={self.previous_policy_generations}` is more than "
                f"`num_generations={self.num_generations}`, which are those of both policies. Lower it, or leave it "
                "out for a third."
            )
        if self.tool_timeout_seconds == 0:
            raise ValueError("`tool_timeout_seconds=0` leaves a call no time. Raise it; `None` sets no limit.")
        if self.max_tool_failure_share > 1:
            raise ValueError(f"`max_tool_failure_share` is a share in [0, 1], got {self.max_tool_failure_share}.")
        if isinstance(self.stop_strings, str):
            raise ValueError(f"`stop_strings` is a string ({self.stop_strings!r}). Pass a list of strings.")
        self.stop_strings = list(self.stop_strings)
        self.temperature_variants = list(self.temperature_variants)
        self._read_texts()
        for sample in range(1 + len(self.temperature_variants)):
            self.sampling(1, sample)  # checks temperatures, top_p, top_k and min_p

    def _check_dialect(self) -> None:
        resolve_dialect(self.dialect)
        if resolve_tool_parser(self.tool_parser) is not None and self.dialect in ("fenced", "action"):
            raise ValueError(
                f"`tool_parser` reads native tool calls, and `dialect={self.dialect!r}` has none. Leave one of the "
                "two out."
            )

    def _read_texts(self) -> None:
        if isinstance(self.chat_template_kwargs, str):  # from a command line
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"`chat_template_kwargs` is not valid JSON: {error}.") from error
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise ValueError(f"`answer_pattern` is not a regular expression: {error}.") from error

    @property
    def explored_generations(self) -> int:
        """`previous_policy_generations`, or its default."""
        given = self.previous_policy_generations
        return self.num_generations // 3 if given is None else given

    def sampling(self, max_new_tokens: int, sample_index: int = 0, **overrides: Any) -> SamplingParams:
        """Sampling parameters of one turn.

        Args:
            max_new_tokens (`int`):
                What the turn's and the trajectory's token limits leave.
            sample_index (`int`, *optional*, defaults to `0`):
                Which sample of its prompt the trajectory is; it chooses among `temperature_variants`.
            **overrides:
                Fields of [`SamplingParams`] that differ from turn to turn.
        """
        temperatures = [self.temperature, *self.temperature_variants]
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=temperatures[sample_index % len(temperatures)],
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            **overrides,
        )

    def sampler_settings(self) -> dict[str, Any]:
        """The settings that decide which trajectories come out, as JSON values; provenance and the journal keep them.

        How fast they come out (concurrency, retries) is left out, as is how many are asked for: a resumed run may
        change either.
        """
        settings = {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name not in _UNRECORDED}
        # Journals from before there was a choice
        for name, default in (("earlier_turns", "rendered"), ("rewrite_history", None)):
            if settings[name] == default:
                del settings[name]
        if "rewrite_history" in settings:
            settings["rewrite_history"] = str(tool_version(resolve_rewriter(self.rewrite_history)))
        if self.tool_parser is not None:
            settings["tool_parser"] = describe_tool_parser(self.tool_parser)
        return {**settings, "dialect": describe_dialect(self.dialect)}


_LEAST = {
    "num_generations": 1,
    "previous_policy_generations": 0,
    "max_tool_calling_iterations": 0,
    "max_turn_tokens": 1,
    "max_trajectory_tokens": 2,
    "tool_retries": 0,
    "tool_timeout_seconds": 0,
    "max_tool_failure_share": 0,
    "max_concurrent_trajectories": 1,
    "max_concurrent_tools": 1,
}
_UNRECORDED = (
    "dialect",
    "tool_parser",
    "num_generations",
    "previous_policy_generations",
    "tool_retries",
    "max_tool_failure_share",
    "max_concurrent_trajectories",
    "max_concurrent_tools",
)
