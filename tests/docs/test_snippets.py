"""Every block of Python in README and docs runs as it stands, page by page, or says above it why it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from tests.support import byte_tokenizer, preference_rows, save_tiny, tiny_model, user
from trl_multiturn import MultiTurnDPOConfig, MultiTurnDPOTrainer, RolloutConfig, ScriptedEngine

from .pages import PAGES, Block, blocks


# A small model on a CPU in place of the reader's: what a page means is the same, and its length is not
MODEL, CPU = re.compile(r'"Qwen/[\w.-]+"'), 'report_to="none", use_cpu=True, bf16=False'
SMALLER = {
    re.compile(r'(Config\("[\w-]+")'): rf"\1, {CPU}",
    re.compile(r"(RolloutConfig\(\s*)num_generations=\d+"): r"\1max_turn_tokens=4, num_generations=2",
    re.compile(r"previous_policy_generations=\d+"): "previous_policy_generations=1",
}


def snippets(page: Path) -> list[Block]:
    """The blocks that run."""
    return [block for block in blocks(page) if block.language == "python" and block.reason is None]


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
    for block in snippets(page):
        text = MODEL.sub(repr(model), block.text)
        for pattern, smaller in SMALLER.items():
            text = pattern.sub(smaller, text)
        exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), space)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_each_block_is_run_or_checked_or_says_why_not(page):
    """Python runs above, commands are checked in `test_commands.py`; what is no code says what it is by its fence."""
    for block in blocks(page):
        assert block.language in ("python", "bash", "json", ""), f"line {block.line}: ```{block.language}"
        assert not block.indent, f"line {block.line}: indented blocks are not run"
        assert block.reason is None or len(block.reason.split()) >= 2
