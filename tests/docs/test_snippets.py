"""Every block of Python in README and docs runs as it stands, page by page, or says above it why it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.support import byte_tokenizer, preference_rows, save_tiny, tiny_model, user
from trl_multiturn import MultiTurnDPOConfig, MultiTurnDPOTrainer, RolloutConfig, ScriptedEngine


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>.+?) -->\n)?```python\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
# A small model on a CPU in place of the reader's: what a page means is the same, and its length is not
MODEL, CPU = re.compile(r'"Qwen/[\w.-]+"'), 'report_to="none", use_cpu=True, bf16=False'
SMALLER = {
    re.compile(r'(Config\("[\w-]+")'): rf"\1, {CPU}",
    re.compile(r"(RolloutConfig\(\s*)num_generations=\d+"): r"\1max_turn_tokens=4, num_generations=2",
    re.compile(r"previous_policy_generations=\d+"): "previous_policy_generations=1",
}


def snippets(page: Path) -> list[tuple[int, str]]:
    """The blocks that run, each with its line."""
    text = page.read_text(encoding="utf-8")
    found = [block for block in _BLOCK.finditer(text) if not block["why"]]
    return [(text.count("\n", 0, block.start("text")), block["text"]) for block in found]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return save_tiny(tmp_path_factory.mktemp("model"), byte_tokenizer("qwen2_5"))


def add(a: int, b: int) -> int:
    """
    Adds two integers.

    Args:
        a: First.
        b: Second.
    """
    return a + b


def names(folder: Path, model: str) -> dict:
    """What a reader has who comes to a page: rows, prompts, a policy, a trainer."""
    tokenizer = byte_tokenizer("qwen2_5")
    pairs = Dataset.from_list(preference_rows())
    args = MultiTurnDPOConfig(str(folder / "out"), report_to="none", use_cpu=True, bf16=False, max_steps=1)
    prompts = [{"prompt": [user("6 * 7?")], "answer": "42"}]
    return {
        "Dataset": Dataset,
        "tokenizer": tokenizer,
        "pairs": pairs,
        "prompts": Dataset.from_list(prompts),
        "held_out": Dataset.from_list(prompts),
        "tools": [add],
        "config": RolloutConfig(num_generations=1, max_turn_tokens=4),
        "engine": ScriptedEngine(["It is \\boxed{42}."], tokenizer),
        "trainer": MultiTurnDPOTrainer(
            tiny_model(tokenizer), args=args, train_dataset=pairs, processing_class=tokenizer
        ),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_their_order(page, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = names(tmp_path, model)
    for line, text in snippets(page):
        text = MODEL.sub(repr(model), text)
        for pattern, smaller in SMALLER.items():
            text = pattern.sub(smaller, text)
        exec(compile("\n" * line + text, str(page), "exec"), space)  # noqa: S102


def test_a_block_that_does_not_run_says_why():
    reasons = [block["why"] for page in PAGES for block in _BLOCK.finditer(page.read_text("utf-8")) if block["why"]]
    assert all(len(reason.split()) >= 2 for reason in reasons)
