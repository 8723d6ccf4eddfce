r"""
The viewer at scale: the size of its page beside the run's compressed journal, and how fast Chromium opens it.

```bash
python benchmarks/viewer.py                                    # 10,000 trajectories of about 600 tokens
python benchmarks/viewer.py --trajectories 1000 --tokens 2000
python benchmarks/viewer.py --run outputs/iterative_multi_turn_dpo
```

Without `--run` a run is made up: words that are as frequent as in a language, programs and outputs, four to six turns,
and log-probabilities with the digits of real ones. Needs Chromium and the extra `browser`.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_multiturn import Journal, StopReason, Trajectory, Verdict
from trl_multiturn.journal.run_folder import RunFolder, find_run_folder
from trl_multiturn.online.report import IterationReport
from trl_multiturn.viewer import view


SAMPLES = 10  # trajectories per prompt
REPEATS = 5


class Words:
    """A vocabulary whose n-th word has a share of about 1/n, and a tokenizer of it."""

    def __init__(self, size: int = 8000):
        rng = random.Random(0)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
        words = dict.fromkeys(
            ["\n", "```python", "```", "```output", "print(", ")", "=", "+", ".", *map(str, range(100))]
        )
        while len(words) < size:
            words["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3))))] = None
        self.words = list(words)
        self.shares = 1.0 / np.arange(3, size + 3)
        self.shares /= self.shares.sum()
        vocabulary = {word: number for number, word in enumerate([*self.words, "<unk>", "<|im_end|>"])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[int], str]:
        ids = rng.choice(len(self.words), size=count, p=self.shares)
        return ids.tolist(), " ".join(self.words[i] for i in ids)


def made_up(words: Words, count: int, tokens: int, iteration: int) -> Iterator[Trajectory]:
    """Trajectories of some prompts, of about so many tokens each."""
    rng = np.random.default_rng(iteration)
    end = len(words.words) + 1
    settings = {"engine": {"engine": "made up"}, "sampler": {"temperature": 1.0, "seed": 0}, "tokenizer": "made up"}
    for number in range(count):
        if number % SAMPLES == 0:
            prompt_ids, question = words.draw(rng, 60)
        ids, mask, messages, turns = [], [], [], int(rng.integers(4, 7))
        for turn in range(turns):
            said, text = words.draw(rng, max(int(tokens / turns * 0.7), 4))
            messages.append({"role": "assistant", "content": f"{text[: len(text) // 2]}\n```python\n{text}\n```"})
            ids, mask = ids + [*said, end], mask + [1] * (len(said) + 1)
            if turn < turns - 1:
                read, text = words.draw(rng, max(int(tokens / turns * 0.3), 4))
                messages.append({"role": "user", "content": f"```output\n{text}\n```"})
                ids, mask = ids + read, mask + [0] * len(read)
        logps = -(rng.exponential(1.0, len(ids)) ** 3).astype(np.float32).astype(float) * mask
        correct = bool(rng.random() < 0.3)
        place = {"prompt_index": number // SAMPLES, "sample_index": number % SAMPLES, "iteration": iteration}
        statuses = ["ok" if rng.random() < 0.9 else "error" for _ in range(turns - 1)]
        seconds = rng.random(turns - 1).tolist()
        yield Trajectory(
            [{"role": "user", "content": question}], messages, prompt_ids, ids, mask, StopReason.ANSWERED,
            logps=logps.tolist(), reward=float(correct), verdict=Verdict.CORRECT if correct else Verdict.INCORRECT,
            info={
                "trajectory_id": f"{iteration}/current/{number // SAMPLES}/{number % SAMPLES}",
                "seed": int(rng.integers(2**62)), "policy": "current", **place, **settings, "turns": turns,
                "tool_calls": turns - 1, "tool_errors": statuses.count("error"), "tool_statuses": statuses,
                "tool_turns": list(range(turns - 1)), "malformed_calls": 0,
                "timing": {"seconds": sum(seconds), "tool_seconds": sum(seconds), "call_seconds": seconds},
            },
        )  # fmt: skip


def make_run(folder: Path, trajectories: int, tokens: int, iterations: int = 2) -> Path:
    words, run = Words(), RunFolder(folder / "rollouts")
    for number in range(iterations):
        report = IterationReport(number, ready=False)
        with Journal(run.iteration(number).journal, sync_seconds=60) as journal:
            for trajectory in made_up(words, trajectories // iterations, tokens, number):
                journal.append(f"{number}/current", trajectory)
                report.count(trajectory)
        report.ready, report.evaluation = True, {"pass@1": 0.3 + number / 10, "pass@1_se": 0.03}
        report.save(run.iteration(number).path)
    words.tokenizer.save_pretrained(folder)
    return folder


def journal_sizes(run: RunFolder) -> dict[str, int]:
    """The bytes of a run's journal: as it is, and compressed whole."""
    shards = [shard for folder in run.iterations() for shard in sorted(folder.journal.glob("shard-*.jsonl"))]
    content = b"".join(shard.read_bytes() for shard in shards)
    return {
        "journal": len(content),
        "gzip -9": len(gzip.compress(content, 9)),
        "xz -6": len(lzma.compress(content, preset=6)),
    }


def in_chromium(page: Path) -> dict[str, float]:
    """Seconds, medians: until rows are drawn, and for what a reader does next."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened, found = [], {}
        for _ in range(REPEATS):
            tab = browser.new_page(viewport={"width": 1400, "height": 900})
            start = time.perf_counter()
            tab.goto(f"{page.as_uri()}#trajectories", wait_until="commit")
            tab.wait_for_selector("table.rows tbody tr:not(.spacer)")
            opened.append(time.perf_counter() - start)
            tab.close()
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.goto(f"{page.as_uri()}#trajectories")
        tab.wait_for_selector("table.rows tbody tr:not(.spacer)")
        found["first search in all texts"] = timed(lambda: search(tab, "no such word"))
        found["next search"] = timed(lambda: search(tab, '"print( 7"'))
        found["filter and sort"] = timed(lambda: search(tab, "verdict:incorrect errors>0 turns>=5"))
        search(tab, "")
        tab.keyboard.press("Escape")
        found["open a trajectory with its tokens"] = timed(lambda: show_tokens(tab, "0·0"))
        steps = [timed(lambda: next_row(tab)) for _ in range(20)]
        found["the next one"] = statistics.median(steps)
        found["tokens drawn"] = tab.locator(".tokens .t").count()
        browser.close()
    return {"open": statistics.median(opened), "open, slowest": max(opened), **found}


def timed(do: Callable[[], Any]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def search(tab: Any, text: str) -> None:
    before = tab.locator("#count").text_content()
    tab.get_by_label("Search and filter").fill(text)
    tab.wait_for_function("before => document.getElementById('count').textContent !== before", arg=before)


def show_tokens(tab: Any, place: str) -> None:
    tab.evaluate(
        "location.hash = 'trajectories?open=' + encodeURIComponent('0/current/0/0') + '&view=tokens&layer=logps'"
    )
    tab.get_by_role("article", name=f"Trajectory {place}").locator(".tokens .t").first.wait_for()


def next_row(tab: Any) -> None:
    before = tab.get_by_role("article").get_attribute("aria-label")
    tab.keyboard.press("j")
    tab.wait_for_function("old => document.querySelector('article').getAttribute('aria-label') !== old", arg=before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="A run that is there, in place of a made-up one.")
    parser.add_argument("--trajectories", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=600, help="Of a completion, on average.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = options.run or make_run(Path(folder), options.trajectories, options.tokens)
        sizes = journal_sizes(find_run_folder(output))
        start = time.perf_counter()
        shown = view(output)
        page = shown.save(Path(folder, "view.html"))
        built = time.perf_counter() - start
        index, size = shown.payload["index"], page.stat().st_size
        tokens = sum(index["columns"]["tokens"])
        print(f"{index['count']} trajectories, {tokens / index['count']:.0f} completion tokens each")
        for name, value in sizes.items():
            print(f"{name:<40} {value / 1e6:10.2f} MB   page: {size / value:.2f} x")
        print(f"{'page':<40} {size / 1e6:10.2f} MB")
        print(f"{'write the page':<40} {built:10.2f} s")
        for name, value in in_chromium(page).items():
            print(f"{name:<40} {value:10.2f}{'' if name == 'tokens drawn' else ' s'}")


if __name__ == "__main__":
    main()
