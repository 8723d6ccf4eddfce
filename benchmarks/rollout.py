"""
The rollout loop and TRL's GRPO tool loop, side by side in one run: waiting, cost of long conversations, memory.

    python benchmarks/rollout.py                                    # the tables, about 15 minutes on two cores
    python benchmarks/rollout.py --trajectories 16 --latencies 0 0.2 --turns 1 4 --memory 100 400 --journal 10000
    python benchmarks/rollout.py --output benchmarks/results/rollout.md

1. *Waiting.* Both loops drive one scripted engine (0.05 s per turn, any number of turns at once), so that only their
   scheduling differs. Trajectories make one to six tool calls; the tool sleeps. "engine idle" is the share of the wall
   time in which no turn is being sampled; "x longest" is the wall time over that of the longest trajectory alone.
2. *Turns.* Both sample the same number of tokens from one model; observations are appended in between. TRL's loop
   reads the whole conversation again at each turn, `TransformersEngine` what was appended.
3. *Memory.* Peak resident memory (Linux) of a process that rolls out, with a journal or with every trajectory kept.
4. *Selection.* Peak anonymous memory (Linux) of a process that turns a journal into rows: as the online loop does,
   prompt by prompt; with every trajectory in memory; and only until the order of the journal's lines is known.

TRL's side is `GRPOTrainer._generate` itself; in 1 its `_generate_single_turn` asks the scripted engine.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, load_from_disk
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from trl_multiturn import (
    Journal,
    PairingConfig,
    RolloutConfig,
    SamplingParams,
    ScriptedEngine,
    StopReason,
    Trajectory,
    TransformersEngine,
    Verdict,
    build_preference_dataset,
    generate_trajectories,
)
from trl_multiturn.iteration import find_rows
from trl_multiturn.rows.selection import select


ENGINE_SECONDS = 0.05
MAX_CALLS = 6


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with the chat template of Qwen2.5 that TRL ships."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_tokens(["<|im_start|>", "<tool_call>", "</tool_call>"], special_tokens=True)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    fast.chat_template = template.read_text(encoding="utf-8")
    return fast


def tiny_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int = 128, layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=16384,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


# 1. Waiting


def make_prompts(count: int) -> Dataset:
    """Prompts whose text says how many calls its trajectory makes."""
    texts = [f"Job {i}: call the tool {1 + i % MAX_CALLS} times." for i in range(count)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})


def play(prompt_text: str, sampling: Any, session: Any) -> str:
    """Calls the tool as often as the prompt says, then answers."""
    wanted = int(re.search(r"call the tool (\d+) times", prompt_text)[1])
    done = prompt_text.count("<tool_response>")
    if done == wanted:
        return "Done."
    return f'<tool_call>\n{{"name": "look_up", "arguments": {{"key": "k{done}"}}}}\n</tool_call>'


def make_tool(latency: float) -> Callable[[str], str]:
    def look_up(key: str) -> str:
        """
        Looks a key up.

        Args:
            key: What to look up.
        """
        time.sleep(latency)
        return f"value of {key}"

    return look_up


class BusyEngine(ScriptedEngine):
    """Knows for how long at least one turn was being sampled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.active, self.since, self.busy_seconds = 0, 0.0, 0.0

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            self.since = time.perf_counter()
        self.active += 1
        try:
            return await super().generate(*args, **kwargs)
        finally:
            self.active -= 1
            if not self.active:
                self.busy_seconds += time.perf_counter() - self.since


class EngineGRPOTrainer(GRPOTrainer):
    """TRL's trainer whose turns come from an engine."""

    engine: BusyEngine

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        sampling = SamplingParams(max_new_tokens=512, stop_token_ids=(self.processing_class.eos_token_id,))

        async def sample() -> list[Any]:
            return await asyncio.gather(*(self.engine.generate(ids, sampling) for ids in prompt_ids))

        generations = asyncio.run(sample())
        return [g.token_ids for g in generations], [g.logps for g in generations]


def grpo_trainer(cls: type, model: Any, tokenizer: Any, folder: str, batch: int, **kwargs: Any) -> GRPOTrainer:
    tools = kwargs.pop("tools", None)
    args = GRPOConfig(
        folder,
        per_device_train_batch_size=batch,
        num_generations=2 if batch > 1 else 1,
        max_completion_length=kwargs.pop("max_completion_length", 8192),
        report_to="none",
        use_cpu=True,
        bf16=False,
        **kwargs,
    )

    def no_reward(completions, **columns):
        return [0.0] * len(completions)

    return cls(
        model=model,
        reward_funcs=no_reward,
        args=args,
        train_dataset=make_prompts(batch),
        processing_class=tokenizer,
        tools=tools,
    )


def longest(latency: float) -> float:
    return MAX_CALLS * (ENGINE_SECONDS + latency) + ENGINE_SECONDS


def waiting(count: int, latencies: list[float]) -> list[str]:
    lines = [
        f"{count} trajectories, one to {MAX_CALLS} calls each, {ENGINE_SECONDS} s per sampled turn",
        "",
        "| tool | loop | seconds | trajectories/s | engine idle | x longest | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    tokenizer = byte_tokenizer()
    config = RolloutConfig(num_generations=1, max_turn_tokens=512, max_trajectory_tokens=8192, dialect="native")
    for latency in latencies:
        tool, prompts, walls = make_tool(latency), make_prompts(count), {}
        for loop in ("GRPOTrainer", "trl_multiturn"):
            engine = BusyEngine(play, tokenizer, latency_seconds=ENGINE_SECONDS)
            if loop == "GRPOTrainer":
                with tempfile.TemporaryDirectory() as folder:
                    model = tiny_model(tokenizer, 16, 1)
                    trainer = grpo_trainer(EngineGRPOTrainer, model, tokenizer, folder, count, tools=[tool])
                    trainer.engine = engine
                    trainer._sync_tool_dicts = [{"look_up": tool}] * count  # as it does for each batch
                    trainer._async_tool_dicts = [{}] * count
                    started = time.perf_counter()
                    trainer._generate([row["prompt"] for row in prompts])
            else:
                started = time.perf_counter()
                found = generate_trajectories(prompts, engine, [tool], config, progress=False)
                assert [t.num_turns for t in found] == [2 + i % MAX_CALLS for i in range(count)]
            wall = walls[loop] = time.perf_counter() - started
            assert len(engine.calls) == sum(2 + i % MAX_CALLS for i in range(count))  # both did the same work
            lines.append(
                f"| {latency} s | {loop} | {wall:.2f} | {count / wall:.1f} | {1 - engine.busy_seconds / wall:.0%} | "
                f"{wall / longest(latency):.2f} | {walls['GRPOTrainer'] / wall:.1f} |"
            )
            print(lines[-1], flush=True)
    return lines


# 2. Turns


def turn_costs(turns: list[int], batch: int = 8, sampled: int = 32, observed: int = 96) -> list[str]:
    lines = [
        f"{batch} trajectories, {sampled} sampled and {observed} observed tokens per turn, a model of 4 layers",
        "",
        "| turns | GRPOTrainer s | tokens read | TransformersEngine s | tokens read | ratio of seconds |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer)
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(0, 200, (n,), generator=generator).tolist()  # noqa: E731
    prompts = [draw(128) for _ in range(batch)]
    observations = [[draw(observed) for _ in range(max(turns))] for _ in range(batch)]
    with tempfile.TemporaryDirectory() as folder:
        stock = grpo_trainer(
            GRPOTrainer, model, tokenizer, folder, batch, max_completion_length=sampled,
            generation_kwargs={"min_new_tokens": sampled},
        )  # fmt: skip

        def by_trl(count: int) -> int:
            histories, read = [list(prompt) for prompt in prompts], 0
            for turn in range(count):
                read += sum(map(len, histories))
                completions, _ = stock._generate_single_turn(histories, None, {}, 1)
                for history, completion, later in zip(histories, completions, observations, strict=True):
                    history += completion + later[turn]
            return read

        async def by_engine(count: int) -> int:
            engine = TransformersEngine(model, tokenizer)

            async def converse(index: int) -> int:
                history, session = list(prompts[index]), str(index)
                for turn in range(count):
                    sampling = SamplingParams(max_new_tokens=sampled, seed=turn)
                    generation = await engine.generate(history, sampling, session=session)
                    history += generation.token_ids + observations[index][turn]
                engine.release(session)
                return len(history) - observed  # each token is read or sampled once; nothing follows the last turn

            return sum(await asyncio.gather(*map(converse, range(batch))))

        by_trl(1), asyncio.run(by_engine(1))  # warm
        for count in turns:
            started = time.perf_counter()
            stock_read = by_trl(count)
            middle = time.perf_counter()
            own_read = asyncio.run(by_engine(count)) - batch * sampled * count
            stock_seconds, own_seconds = middle - started, time.perf_counter() - middle
            lines.append(
                f"| {count} | {stock_seconds:.2f} | {stock_read} | {own_seconds:.2f} | {own_read} | "
                f"{stock_seconds / own_seconds:.1f} |"
            )
            print(lines[-1], flush=True)
    return lines


# 3. Memory


def memory(counts: list[int]) -> list[str]:
    lines = [
        "two processes per row: with a journal and `collect=False`, and with every trajectory returned",
        "",
        "| trajectories | journal, peak MiB above start | returned, peak MiB above start | trajectories/s, journal |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for count in counts:
        results = []
        for collect in (False, True):
            command = [sys.executable, __file__, "--one-memory", str(count), str(int(collect))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(tuple(map(float, done.stdout.split()[-2:])))
        (journal, seconds), (returned, _) = results
        lines.append(f"| {count} | {journal:.0f} | {returned:.0f} | {count / seconds:.0f} |")
        print(lines[-1], flush=True)
    return lines


def one_memory(count: int, collect: bool) -> None:
    """Rolls out in this process, and prints how far memory rose above the first few trajectories, and the seconds."""
    engine = ScriptedEngine(play, byte_tokenizer())
    engine.calls = _Forgetful()
    config = RolloutConfig(num_generations=1, max_turn_tokens=512, max_trajectory_tokens=8192, dialect="native")
    prompts, tool = make_prompts(count), make_tool(0.0)
    generate_trajectories(prompts.select(range(20)), engine, [tool], config, progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak_kib()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        journal = None if collect else folder
        kept = generate_trajectories(prompts, engine, [tool], config, journal=journal, collect=collect, progress=False)
    seconds = time.perf_counter() - started
    assert len(kept) == (count if collect else 0)
    print((_peak_kib() - before) / 1024, seconds)


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


class _Forgetful(list):
    """The engine's record of its calls, which would be the memory that is measured."""

    def append(self, item: Any) -> None:
        pass


# 4. Selection


def selection(counts: list[int]) -> list[str]:
    lines = [
        f"{SAMPLES} trajectories of {TOKENS} tokens per prompt, one pair of each; a process per number",
        "",
        "| trajectories | journal MiB | order, peak MiB | prompt by prompt, peak MiB | s | at once, peak MiB | s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            write_journal(count, Path(folder, "journal"))
            size = sum(path.stat().st_size for path in Path(folder, "journal").iterdir()) / 2**20
            found = {}
            for what in ("order", "prompt by prompt", "at once"):
                command = [sys.executable, __file__, "--one-selection", what, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[what] = done.stdout.split()
        (order, _), (streamed, seconds), (whole, whole_seconds) = found.values()
        lines.append(f"| {count} | {size:.0f} | {order} | {streamed} | {seconds} | {whole} | {whole_seconds} |")
        print(lines[-1], flush=True)
    return lines


SAMPLES, TOKENS = 10, 64


def write_journal(count: int, folder: Path) -> None:
    """Finished and judged trajectories, half of them correct, in no order of prompts."""
    numbers = list(range(count))
    random.Random(0).shuffle(numbers)
    with Journal(folder) as journal:
        for number in numbers:
            prompt, sample = divmod(number, SAMPLES)
            trajectory = Trajectory(
                prompt=[{"role": "user", "content": f"Question {prompt}?"}],
                completion=[{"role": "assistant", "content": f"Answer {number}. " * 4}],
                prompt_ids=[prompt, 1, 2],
                completion_ids=[number + i for i in range(TOKENS)],
                action_mask=[1] * TOKENS,
                logps=[-i / 7 for i in range(TOKENS)],
                stop_reason=StopReason.ANSWERED,
                info={"prompt_index": prompt, "sample_index": sample, "trajectory_id": f"0/current/{prompt}/{sample}"},
            )
            journal.append("0/current", trajectory)
            verdict = Verdict.CORRECT if sample % 2 else Verdict.INCORRECT
            journal.judge("0/current", trajectory.judged(verdict, float(sample % 2)))


def one_selection(what: str, folder: Path) -> None:
    """Does it in this process, and prints by how many MiB anonymous memory rose, and the seconds."""
    journal, config = Journal(folder / "journal"), PairingConfig(filters=[])
    warm = Dataset.from_dict({"a": [1]})
    warm.save_to_disk(folder / "warm")
    load_from_disk(folder / "warm")
    with AnonymousMemory() as memory:
        started = time.perf_counter()
        if what == "order":
            trajectories = journal.read()
            next(trajectories)  # the order stands
        elif what == "prompt by prompt":
            assert find_rows(folder, config, "preference").trajectories
            assert len(load_from_disk(folder / "rows"))
        else:
            trajectories = list(journal.read())
            rows = build_preference_dataset(select(trajectories, config))
            rows.save_to_disk(folder / "whole")
            assert rows.to_list() == load_from_disk(folder / "rows").to_list()
        seconds = time.perf_counter() - started
    print(f"{memory.peak:.0f} {seconds:.0f}")
    if what == "at once":
        assert load_from_disk(folder / "whole").to_list() == load_from_disk(folder / "rows").to_list()


class AnonymousMemory:
    """How far a process's own memory rises, in MiB; pages of files, which the system can drop, are left out."""

    def __init__(self) -> None:
        self._start, self.peak = 0.0, 0.0
        self._start = self.now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def now(self) -> float:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024 - self._start

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.peak = max(self.peak, self.now())
        self._over.set()
        self._thread.join()


def report(
    sections: dict[str, list[str]],
    arguments: list[str],
    note: str | None,
    title: str = "Rollouts: this loop and TRL's",
    script: str = "rollout.py",
) -> str:
    cpu = next((line.split(": ")[1] for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    head = [
        f"# {title}",
        "",
        f"`python benchmarks/{script} {' '.join(arguments)}`".replace(" `", "`"),
        "",
        f"{datetime.date.today()}; {os.cpu_count()} cores ({cpu}); Python {platform.python_version()}, "
        f"torch {torch.__version__}, trl {trl.__version__}. {note or ''}".strip(),
    ]
    for title, lines in sections.items():
        head += ["", f"## {title}", "", *lines]
    return "\n".join(head) + "\n"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--latencies", type=float, nargs="*", default=[0.0, 0.2, 1.0])
    parser.add_argument("--turns", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--memory", type=int, nargs="*", default=[500, 2000, 4000])
    parser.add_argument("--journal", type=int, nargs="*", default=[50_000, 200_000])
    parser.add_argument("--output", type=Path, help="Markdown file for the tables.")
    parser.add_argument("--note", help="A sentence about the machine, for the file.")
    parser.add_argument("--one-memory", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one-selection", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_selection:
        return one_selection(args.one_selection[0], Path(args.one_selection[1]))
    if args.one_memory:
        return one_memory(args.one_memory[0], bool(args.one_memory[1]))
    sections = {}
    if args.latencies:
        sections["Waiting for tools"] = waiting(args.trajectories, args.latencies)
    if args.turns:
        sections["Cost of turns"] = turn_costs(args.turns)
    if args.memory:
        sections["Memory"] = memory(args.memory)
    if args.journal:
        sections["Selection"] = selection(args.journal)
    text = report(sections, sys.argv[1:], args.note)
    print("\n" + text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
