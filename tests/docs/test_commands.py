"""The commands in README and docs have flags, files, modules and extras that exist."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib

import pytest

from .pages import DOCS, PAGES, ROOT, blocks


EXAMPLES = ROOT / "examples"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


def commands() -> list:
    found = {}
    for page in PAGES:
        for block in blocks(page):
            for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
                words = shlex.split(line, comments=True)
                if words:
                    found[line] = pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")
    return list(found.values())


def named_files(words: list[str]) -> list[str]:
    """Files of the repository, modules of its benchmarks among them."""
    modules = [f"{word.replace('.', '/')}" for word in words if re.fullmatch(r"benchmarks(\.\w+)+", word)]
    return [word for word in words if re.fullmatch(r"(examples|benchmarks|\.ci)/[\w./-]+", word)] + modules


def script_of(words: list[str]) -> str | None:
    """The example whose flags [`parser_of`] knows."""
    names = [re.fullmatch(r"examples/(iterative_\w+|evaluate)\.py", word) for word in words]
    return next((name[1] for name in names if name), None)


@pytest.mark.parametrize("words", [c for c in commands() if named_files(c.values[0])])
def test_the_files_that_a_command_names_exist(words):
    exists = {name: any((ROOT / f"{name}{end}").exists() for end in ("", ".py")) for name in named_files(words)}
    assert [name for name, there in exists.items() if not there] == []


@pytest.mark.parametrize("words", [c for c in commands() if c.values[0][0] == "trl-multiturn"])
def test_the_flags_of_our_command_exist(words):
    from trl_multiturn.cli import build_parser

    arguments, unknown = build_parser().parse_known_args(words[1:])
    assert not unknown and arguments


@pytest.mark.parametrize("words", [c for c in commands() if script_of(c.values[0])])
def test_the_flags_of_an_example_exist(words, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    parser = importlib.import_module(script_of(words)).make_parser()
    ours = words[next(i for i, word in enumerate(words) if word.startswith("examples/")) :]
    assert {word for word in ours if word.startswith("--")} - {"--config"} <= set(parser._option_string_actions)


def test_the_extras_that_the_pages_name_exist_and_start_names_all():
    text = "".join(page.read_text("utf-8") for page in PAGES)
    named = {name for group in re.findall(r'"\.\[([\w,-]+)\]"', text) for name in group.split(",")}
    assert named <= set(EXTRAS)
    table = re.search(r"\| extra \| for \|\n(.*?)\n\n", (DOCS / "start.md").read_text("utf-8"), re.DOTALL)[1]
    first_columns = "".join(line.split(" | ")[0] for line in table.splitlines())
    assert set(re.findall(r"`([\w-]+)`", first_columns)) == set(EXTRAS)
