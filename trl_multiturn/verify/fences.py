"""The fenced blocks of a turn: which of them call a tool, with what text, and where they stand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


_ALIASES = {"python": ("py", "ipython", r"python\d(?:\.\d+)?")}  # what models call it, in any case
_ANY_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
# What may stand before a fence that is indented, or belongs to an item of a list
_MARGIN = re.compile(r"(?:[ \t]|[-*+>][ \t]|\d+[.)][ \t])*\Z")


@dataclass(frozen=True)
class Block:
    """A fenced block that calls a tool.

    Attributes:
        tool (`str`): the tool's name.
        text (`str`): what stands in the block, with its own line ends and indentation taken back.
        start, end (`int`): where the block stands in the turn, fences included.
        closed (`bool`): whether a fence ends it.
    """

    tool: str
    text: str
    start: int
    end: int
    closed: bool


class FenceReader:
    """Finds the blocks that call tools.

    A block begins with a fence of backticks or tildes and the name of a tool (or a usual name of its language: `py`,
    `Python`, `python3`), and ends at the next line that begins with a fence. A block on one line, an indented one and
    one whose last line of code carries the fence are read, too.

    Args:
        tools (`Iterable[str]`):
            Names of the tools.
    """

    def __init__(self, tools: Iterable[str]) -> None:
        self._tools = list(tools)
        groups = ("|".join([re.escape(tool), *self._aliases(tool)]) for tool in self._tools)
        names = "|".join(f"({group})" for group in groups) or r"((?!))"
        # Possessive, and only where a run of marks begins: what a policy repeats without end takes no time to read
        self._opening = re.compile(
            rf"(?<![`~])(?P<fence>(?P<mark>[`~])(?P=mark){{2,}}+)[ \t]*+(?i:{names})"
            r"(?P<rest>(?:[ \t\r][^\n]*+)?)(?P<newline>\n|\Z)"
        )

    def _aliases(self, tool: str) -> list[str]:
        return [alias for alias in _ALIASES.get(tool.lower(), ()) if alias not in self._tools]

    def blocks(self, text: str) -> Iterator[Block]:
        """The blocks of a turn that call tools, in order."""
        position = 0
        while (opening := self._opening.search(text, position)) is not None:
            block = self._block(text, opening)
            if block is not None:
                yield block
            position = opening.start("rest") if block is None else block.end

    def _block(self, text: str, opening: re.Match[str]) -> Block | None:
        rest = opening["rest"].strip()
        if not rest and opening["newline"]:
            return self._lines(text, opening)
        code = rest.removesuffix(opening["fence"])
        if code == rest or not code or "`" in code or "~" in code:
            return None
        return Block(self._tool(opening), code.rstrip(), opening.start(), opening.end("rest"), True)

    def _lines(self, text: str, opening: re.Match[str]) -> Block:
        # A closing fence stands at the beginning of a line, so that code may hold backticks in its strings
        mark, length = opening["mark"], len(opening["fence"])
        closing = re.compile(rf"^[ \t]*(?P<fence>{mark}{{{length},}})", re.MULTILINE).search(text, opening.end())
        code = text[opening.end() : len(text) if closing is None else closing.start()]
        if carried := code.rstrip().endswith(mark * 3):  # the last line of code has the fence at its end
            code = code.rstrip().rstrip(mark).rstrip()
        end = len(text)
        if closing is not None:  # a fence that opens the next block ends this one as well
            opens = self._opening.match(text, closing.start("fence"))
            end = closing.start("fence") if opens and not opens["rest"].strip() else closing.end()
        code = _without_margin(code.replace("\r\n", "\n"), _margin(text, opening.start()))
        return Block(self._tool(opening), code, opening.start(), end, closing is not None or carried)

    def _tool(self, opening: re.Match[str]) -> str:
        groups = opening.groups()[2:]
        return next(tool for tool, name in zip(self._tools, groups, strict=False) if name is not None)


def after(text: str, blocks: Iterable[Block]) -> str:
    """The text after the last of its blocks."""
    return text[max((block.end for block in blocks), default=0) :]


def has_fence(text: str) -> bool:
    """Whether a line of the text begins with a fence."""
    return _ANY_FENCE.search(text) is not None


def _margin(text: str, fence: int) -> int:
    """How far a fence is indented; 0 where it follows words."""
    before = text[text.rfind("\n", 0, fence) + 1 : fence]
    return len(before) if _MARGIN.match(before) else 0


def _without_margin(code: str, margin: int) -> str:
    return re.sub(rf"^[ \t]{{0,{margin}}}", "", code, flags=re.MULTILINE) if margin else code
