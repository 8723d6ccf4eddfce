"""
An iteration of the online loop with rollouts and training in turns, and with both at once (`max_policy_lag=1`).

    python benchmarks/overlap.py                                        # two engines, tools of 0 and 0.3 s a call
    python benchmarks/overlap.py --latencies 0.3 --iterations 5 --repeats 3
    python benchmarks/overlap.py --model path/to/SmolLM2-135M-Instruct --engines own
    python benchmarks/overlap.py --engines vllm                         # where vLLM is installed

The policy is trained by M-DPO on the CPU. Each of its turns is a call of a tool that sleeps; as many trajectories as
`--at_once` are under way together (a tool with a rate limit, a pool of environments). Three engines:

- *elsewhere*: a scripted engine that takes `--turn_seconds` a turn and no processor, as a server on another device;
- *the policy's own*: a `TransformersEngine`, which takes turns with the training on the same cores;
- *vLLM*: a `VLLMEngine` in processes of its own, on the same device; it loads a checkpoint per iteration and policy.

An iteration is the median wall time from the end of one training to the end of the next. The first iteration is left
out, whose rollouts have nothing to overlap with, and the last, beside whose training nothing is rolled out. The longer
part of an iteration in turns over the sum of both is what an overlap that costs nothing would leave. Runs alternate.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import hashlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    PairingConfig,
    RolloutConfig,
    ScriptedEngine,
    ToolRolloutGenerator,
)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

NAMES = {"own": "the policy's own", "elsewhere": "elsewhere", "vllm": "vLLM"}
STOPS = [chr(code) for code in range(33, 127) if code % 8 == 0]  # a random policy would hardly ever end a turn


class Run(NamedTuple):
    """Seconds of an iteration of a run, of its rollouts and its training, and of the run; calls per trajectory."""

    iteration: float
    rollouts: float
    training: float
    whole: float
    calls: float


def small_policy() -> tuple[Any, Any]:
    """A model of 7 million random weights over bytes."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<pad>")
    fast.add_tokens(["<|im_start|>"], special_tokens=True)
    fast.chat_template = CHATML
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), max_position_embeddings=4096, **shape)), fast


def policy_of(model: str | None) -> tuple[Any, Any]:
    if model is None:
        return small_policy()
    return AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)


def waiting_tool(seconds: float) -> Any:
    def look_up(query: str) -> str:
        """
        Looks something up.

        Args:
            query: What.
        """
        time.sleep(seconds)
        return "Nothing was found."

    return look_up


def parity(completions: list[Any], **columns: Any) -> list[float]:
    """About half of what a policy writes is right, whoever it is."""
    texts = ["".join(message["content"] for message in completion) for completion in completions]
    return [float(hashlib.sha256(text.encode()).digest()[0] % 2) for text in texts]


@functools.cache
def vllm_engine(model: str | None) -> Any:
    """One engine for all runs, whose weights each run replaces."""
    from trl_multiturn.engines.vllm.engine import VLLMEngine

    policy, tokenizer = policy_of(model)
    folder = tempfile.mkdtemp()
    for part in (policy, tokenizer):
        part.save_pretrained(folder)
    settings = dict(max_model_len=2048, enforce_eager=True, kv_cache_memory_bytes=512 * 2**20, dtype="float32")
    return VLLMEngine(folder, tokenizer, **settings)


class EndsOfTraining(TrainerCallback):
    """When each iteration's training ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


def run(arguments: argparse.Namespace, engine: str, latency: float, lag: int) -> Run:
    model, tokenizer = policy_of(arguments.model)

    def script(prompt_text: str, sampling: Any, session: str) -> str:
        return (
            f"query {hashlib.sha256(f'{session}{len(prompt_text)}'.encode()).hexdigest()[: arguments.turn_tokens - 6]}"
        )

    engines: dict[str, Callable[[], Any]] = {
        "own": lambda: None,
        "elsewhere": lambda: ScriptedEngine(script, tokenizer, latency_seconds=arguments.turn_seconds),
        "vllm": lambda: vllm_engine(arguments.model),
    }
    generator = ToolRolloutGenerator(
        Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}?"}] for i in range(arguments.prompts)]}),
        tools=[waiting_tool(latency)],
        reward_funcs=[parity],
        config=RolloutConfig(
            num_generations=4,
            previous_policy_generations=0,
            dialect="action",
            action_prefix="",
            max_turn_tokens=4 * arguments.turn_tokens,
            stop_strings=[] if arguments.model or engine == "elsewhere" else STOPS,
            max_trajectory_tokens=1024,
            max_tool_calling_iterations=arguments.calls,
            max_concurrent_trajectories=arguments.at_once,
        ),
        pairing=PairingConfig(filters=[], max_pairs_per_prompt=2),
        engine=engines[engine](),
        max_policy_lag=lag,
    )
    with tempfile.TemporaryDirectory() as folder:
        args = MultiTurnDPOConfig(
            folder,
            num_train_epochs=arguments.iterations,
            per_device_train_batch_size=2,
            learning_rate=1e-5,
            max_length=1024,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        ends = EndsOfTraining()
        trainer = MultiTurnDPOTrainer(model, args=args, processing_class=tokenizer, callbacks=[generator, ends])
        started = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - started
        reports = generator.reports[1:-1]
        calls = sum(report.tool_calls for report in reports) / sum(report.trajectories for report in reports)
        assert all(report.rows for report in reports) and {report.policy_lag for report in reports} == {lag}
    return Run(
        statistics.median(after - before for before, after in zip(ends.times, ends.times[1:-1], strict=False)),
        statistics.median(report.rollout_seconds for report in reports),
        statistics.median(report.train_seconds for report in reports),
        whole,
        calls,
    )


def table(arguments: argparse.Namespace) -> list[str]:
    titles = ["engine", "s per call", "calls per trajectory", "rollouts + training, in turns", "iteration, in turns"]
    titles += ["at once", "ratio (min..max)", "longer part / sum", "whole run"]
    lines = [f"| {' | '.join(titles)} |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for engine in arguments.engines:
        for latency in arguments.latencies:
            pairs = [[run(arguments, engine, latency, lag) for lag in (0, 1)] for _ in range(arguments.repeats)]
            lines.append(f"| {' | '.join([NAMES[engine], f'{latency:g}', *cells(pairs)])} |")
            print(lines[-1], flush=True)
    return lines


def cells(pairs: list[list[Run]]) -> list[str]:
    """Of pairs of runs, in turns and at once."""
    ratios = sorted(at_once.iteration / in_turns.iteration for in_turns, at_once in pairs)
    in_turns, at_once = (Run(*map(statistics.median, zip(*arm, strict=True))) for arm in zip(*pairs, strict=True))
    parts = in_turns.rollouts, in_turns.training
    return [
        f"{in_turns.calls:.1f}",
        f"{parts[0]:.1f} + {parts[1]:.1f} s",
        f"{in_turns.iteration:.1f} s",
        f"{at_once.iteration:.1f} s",
        f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f}..{ratios[-1]:.2f})",
        f"{max(parts) / sum(parts):.2f}",
        f"{in_turns.whole:.1f} → {at_once.whole:.1f} s",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model; by default a small one with random weights")
    parser.add_argument("--engines", nargs="+", default=["elsewhere", "own"], choices=list(NAMES))
    parser.add_argument("--latencies", nargs="+", type=float, default=[0.0, 0.3])
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--calls", type=int, default=3, help="tool calls per trajectory")
    parser.add_argument("--turn_tokens", type=int, default=24)
    parser.add_argument("--turn_seconds", type=float, default=0.05, help="of the engine elsewhere")
    parser.add_argument("--at_once", type=int, default=8, help="trajectories under way together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    lines = table(arguments)
    print(
        f"\n{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, one thread, load average "
        f"{load:.1f} before, {os.getloadavg()[0]:.1f} after; {arguments.prompts} prompts x 4 trajectories of "
        f"{arguments.calls} calls at most, {arguments.at_once} at once, {arguments.repeats} runs of each.\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
