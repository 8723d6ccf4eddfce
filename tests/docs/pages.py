"""The pages of the documentation as they stand in the repository, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,})(?P<language>.*)$")
_REASON = re.compile(r"<!-- not run: (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: what follows its fence, its text, the number of its first line from 1, and why it is not run."""

    language: str
    text: str
    line: int
    indent: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found, fence, before = [], None, ""
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if fence is None and match:
            fence, start, lines, reason = match, number + 1, [], _REASON.fullmatch(before)
        elif fence and match and not match["language"] and match["ticks"].startswith(fence["ticks"]):
            text = "".join(f"{line}\n" for line in lines)
            found.append(Block(fence["language"], text, start, fence["indent"], reason[1] if reason else None))
            fence = None
        elif fence:
            lines.append(line)
        before = line
    assert fence is None, f"{page}, line {start}: the block is not closed"
    return found
