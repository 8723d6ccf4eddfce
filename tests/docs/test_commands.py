"""The commands in README and docs have flags that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list:
    found = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in _BLOCK.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    found[line] = pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")
    return list(found.values())


def named_files(words: list[str]) -> list[str]:
    return [word for word in words if re.fullmatch(r"(examples|benchmarks|\.ci)/[\w./-]+", word)]


@pytest.mark.parametrize("words", [c for c in commands() if named_files(c.values[0])])
def test_the_files_that_a_command_names_exist(words):
    assert [name for name in named_files(words) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("words", [c for c in commands() if c.values[0][0] == "trl-multiturn"])
def test_the_flags_of_our_command_exist(words):
    from trl_multiturn.cli import build_parser

    arguments, unknown = build_parser().parse_known_args(words[1:])
    assert not unknown and arguments
