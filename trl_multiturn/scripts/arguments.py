"""The flags of the online scripts: the package's own configurations, and what a script adds to them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments, TrlParser

from ..rollout.config import RolloutConfig
from ..rows.selection import PairingConfig, UnpairedConfig


@dataclass
class PromptArguments(ScriptArguments):
    """Where prompts and gold answers come from, and what judges a rollout."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Questions and answers: a JSONL, Parquet, Arrow or CSV file, a folder, or a dataset on the Hub. "
            "Without it the example scripts use their embedded problems."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out questions in a dataset or file of their own."}
    )
    question_column: str | None = field(
        default=None,
        metadata={"help": "Column with the question (or the prompt's messages); by default the one that is there."},
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the gold answer: plain, GSM8K's (`… #### 18`) or a MATH solution (`… \\boxed{18}`); "
            "by default the one that is there."
        },
    )
    num_eval_prompts: int = field(default=200, metadata={"help": "Most held-out prompts (0: no evaluation)."})
    tools: list[str] = field(
        default_factory=lambda: ["python"],
        metadata={
            "help": "What the policy may call: `python` (the interpreter), or dotted paths of functions, tools, or "
            "classes that need no arguments (`my_package.my_tool`)."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_reward"],
        metadata={
            "help": "What judges: `math_reward`, functions of `trl.rewards` (`accuracy_reward`), or dotted paths."
        },
    )
    num_shots: int = field(
        default=0,
        metadata={
            "help": "Worked examples in front of every prompt, for a policy that does not know the tools' format yet."
        },
    )
    shots_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset or file of worked examples (`messages`, or `prompt` and `completion`); by default three "
            "that use the Python interpreter."
        },
    )
    eval_generations: int = field(
        default=1,
        metadata={"help": "Samples per held-out prompt for pass@n and maj@n besides the greedy one; 1: greedy only."},
    )
    log_completions: bool = field(
        default=False,
        metadata={"help": "Whether to print a few trajectories and log them to the trackers of `--report_to`."},
    )
    num_completions_to_print: int = field(default=5, metadata={"help": "How many of them, at most."})


@dataclass
class OnlineScriptArguments(PromptArguments):
    """Those of the online loop, beside the rollouts' and the rows'. `num_train_epochs` is the number of iterations."""

    prompts_per_iteration: int | None = field(
        default=None, metadata={"help": "Prompts of one iteration, in order; all of them by default."}
    )
    reference: Literal["previous", "initial"] = field(
        default="previous", metadata={"help": "Reference policy of an iteration."}
    )
    history: Literal["latest", "all"] = field(
        default="latest", metadata={"help": "Train on the rows of the latest iteration, or of all so far."}
    )
    max_policy_lag: int = field(
        default=0,
        metadata={
            "help": "1: the next iteration is rolled out while this one trains, by the policy with which its training "
            "began. 0: rollouts and training take turns."
        },
    )
    lr_schedule: Literal["run", "iteration"] = field(
        default="run", metadata={"help": "One learning-rate schedule over the whole run, or one per iteration."}
    )


@dataclass
class RolloutArguments(RolloutConfig):
    """[`RolloutConfig`] beside a trainer's configuration, whose `--seed` is its seed, too."""

    seed: int = field(default=0, init=False)
    dialect: str = field(default="fenced", metadata=RolloutConfig.__dataclass_fields__["dialect"].metadata)
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System message for prompts that have none of their own; by default one that tells of tools and "
            "answer, and '' for none."
        },
    )


@dataclass
class PairingArguments(PairingConfig):
    """[`PairingConfig`] beside a trainer's configuration, whose `--seed` is its seed, too."""

    seed: int = field(default=0, init=False)


@dataclass
class UnpairedArguments(UnpairedConfig):
    """[`UnpairedConfig`] beside a trainer's configuration, whose `--seed` is its seed, too."""

    seed: int = field(default=0, init=False)


@dataclass
class EngineArguments:
    """What samples. The names are those of [`~trl.GRPOConfig`]."""

    rollout_batch_size: int = field(
        default=64,
        metadata={"help": "Trajectories that sample a token together (without vLLM, which decides by itself)."},
    )
    use_vllm: bool = field(default=False, metadata={"help": "Whether to sample with vLLM (extra `vllm`)."})
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate",
        metadata={"help": "`colocate`: vLLM in this process, on the same device. `server`: a running `vllm serve`."},
    )
    vllm_server_base_url: list[str] = field(
        default_factory=lambda: ["http://localhost:8000"],
        metadata={"help": "Where the server listens, or several that share the work (`vllm_mode` server)."},
    )
    vllm_server_timeout: float = field(default=600.0, metadata={"help": "Seconds that one turn may take there."})
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of the device's memory for vLLM (`vllm_mode` colocate)."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Context of vLLM; by default `max_trajectory_tokens` (colocate)."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "Devices of one engine (colocate)."})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Frees vLLM's memory while the policy is trained (colocate)."}
    )
    vllm_model_impl: Literal["auto", "vllm", "transformers"] = field(
        default="auto", metadata={"help": "Whose implementation of the model vLLM uses (colocate)."}
    )


@dataclass
class WarmStartArguments:
    """A policy that learns the format before the first iteration."""

    warm_start: str | None = field(
        default=None,
        metadata={
            "help": "What the policy imitates before the first iteration: `rollouts`, its own verified rollouts "
            "(RAFT), or a dataset or file of conversations (`messages`, or `prompt` and `completion`)."
        },
    )
    warm_start_prompts: int = field(default=400, metadata={"help": "Most prompts that `rollouts` samples from."})
    warm_start_generations: int = field(default=8, metadata={"help": "Rollouts of each."})
    warm_start_winners: int = field(default=1, metadata={"help": "Most verified rollouts of a prompt to imitate."})
    warm_start_rows: int | None = field(default=None, metadata={"help": "Most rows to imitate; all by default."})
    warm_start_learning_rate: float = field(default=2e-5, metadata={"help": "Learning rate (5 to 10 times for LoRA)."})
    warm_start_epochs: float = field(default=1.0, metadata={"help": "Passes over the rows."})
    warm_start_batch_size: int | None = field(
        default=None, metadata={"help": "Rows per device and step; by default the trainer's."}
    )


class OnlineArguments(NamedTuple):
    """What [`parse_online`] reads."""

    script: Any
    training: Any
    model: ModelConfig
    rollout: RolloutConfig
    pairing: PairingConfig | UnpairedConfig
    engine: EngineArguments
    warm_start: WarmStartArguments


def online_parser(
    training: type[TrainingArguments],
    pairing: type[PairingConfig] | type[UnpairedConfig] = PairingArguments,
    script: type[PromptArguments] = OnlineScriptArguments,
) -> TrlParser:
    """The parser of an online script."""
    types: list[Any] = [script, training, ModelConfig, RolloutArguments, pairing, EngineArguments, WarmStartArguments]
    return TrlParser(types)


def parse_online(
    parser: TrlParser, arguments: Sequence[str] | None = None, default_config: str | Path | None = None
) -> OnlineArguments:
    """
    Reads the command line of an online script.

    Args:
        parser ([`~trl.TrlParser`]):
            From [`online_parser`].
        arguments (`Sequence[str]`, *optional*):
            Defaults to the command line.
        default_config (`str` or `Path`, *optional*):
            YAML file that is read where neither a model nor a `--config` is named.

    Returns:
        [`OnlineArguments`], whose rollout and pairing configurations have the trainer's seed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if default_config and not any(a.startswith(("--model_name_or_path", "--config")) for a in arguments):
        arguments = ["--config", str(default_config), *arguments]
    parsed: tuple[Any, ...] = parser.parse_args_and_config(arguments)
    script, training, model, rollout, pairing, engine, warm_start = parsed
    pairing_class: Any = PairingConfig if isinstance(pairing, PairingConfig) else UnpairedConfig
    rollout, pairing = seeded(RolloutConfig, rollout, training.seed), seeded(pairing_class, pairing, training.seed)
    rollout.system_prompt = system_prompt(rollout, script.tools)
    return OnlineArguments(script, training, model, rollout, pairing, engine, warm_start)


C = TypeVar("C")


def seeded(config_class: type[C], arguments: Any, seed: int) -> C:
    """The package's configuration from a script's arguments, with a trainer's seed."""
    values = {f.name: getattr(arguments, f.name) for f in fields(config_class)}  # type: ignore[arg-type]
    return config_class(**{**values, "seed": seed})


FENCED_PROMPT = (
    "Solve the problem with Python. Write one ```python block at a time; its output comes back in an ```output block. "
    "When you know the answer, put it in \\boxed{}."
)
TOOLS_PROMPT = "Solve the problem with the tools. When you know the answer, put it in \\boxed{}."


def system_prompt(rollout: RolloutConfig, tools: Sequence[str]) -> str | None:
    """The system message of a script: the user's, none where that is empty, else one for dialect and tools."""
    if rollout.system_prompt is not None:
        return rollout.system_prompt or None
    return FENCED_PROMPT if rollout.dialect == "fenced" and list(tools) == ["python"] else TOOLS_PROMPT
