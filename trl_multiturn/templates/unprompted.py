"""Turns whose rendering does not continue the prompt that they were sampled from, and what of them was sampled."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from os.path import commonprefix

from ..messages import REASONING, Message
from .endings import Endings
from .form import Form
from .probes import ANSWER, USER, call_turn, common_suffix, tool_name
from .rendering import Renderer


_TAG = re.compile(r"\s*(<[^<>\s/]+>|\[[^\[\]\s/]+\])")
_LAST_TAG = re.compile(r"(?:<[^<>\s/]+>|\[[^\[\]\s/]+\])\s*\Z")
_TAGS = re.compile(r"(?:\s|<[^<>\s]+>|\[[^\[\]\s]+\])*")
_CLOSES = re.compile(r"<\|?(?:/|END_|end_)|\[/")
_THOUGHTS = ("prb1thought", "prb2thought")


class UnpromptedTurn:
    """An assistant turn that is rendered otherwise than it was prompted.

    The difference is known where the prompt prints more than the finished turn (a block of reasoning, closed or left
    open), other blanks, another header, or other words further up (a system message that only the last user turn
    shows).

    Args:
        render ([`Renderer`]), form ([`Form`]), endings ([`Endings`]): the template.
        messages (`list[dict]`): in the template's form, up to and including the turn.
        prompt (`str`): the rendering of all before it, with the generation prompt.
        body (`str`): the rendering of all, without what ends the turn.

    Attributes:
        closes_block (`bool`): whether `words` found that the turn, which has no reasoning, closes at once the block
            that its prompt opened.
        printed (`str`): how far its prompt had begun the turn's own text, where that holds its reasoning.
    """

    def __init__(
        self, render: Renderer, form: Form, endings: Endings, messages: Sequence[Message], prompt: str, body: str
    ):
        self._render = render
        self._form = form
        self._endings = endings
        self._before, self._turn = list(messages[:-1]), messages[-1]
        self._prompt = prompt
        self._body = body
        self._thought = thought_of(messages[-1])
        self.closes_block = False
        self.printed = ""

    def words(self) -> str | None:
        """What was sampled, without what ended it; `None` where that is unknown."""
        readings = (self._closing_an_open_block, self._behind_an_answers_header, self._behind_any_header)
        found = (reading() for reading in (*readings, self._but_for_blanks))
        return next((words for words in found if words is not None), None)

    def with_thought(self, words: str) -> str:
        """What was sampled, where the rendering continues the prompt with `words`: they close a block that the prompt
        opened, and the template shows what stands behind it alone (DeepSeek V3.1)."""
        tag = _LAST_TAG.search(self._prompt)
        if not self._thought or self._thought.strip() in words or tag is None:
            return words
        mark = self._closing_mark(tag[0])
        closed = mark is not None and words.startswith(mark) and mark not in _text(self._turn)
        return self._thought + words if closed else words

    def _closing_an_open_block(self) -> str | None:
        """A turn without reasoning behind a prompt that opened a block for it: what a turn with an empty one has.

        The template's own rendering of the turn with reasoning, without that reasoning.
        """
        keys = self._form.reasoning_keys(calls=bool(self._turn.get("tool_calls")))
        if self._thought or not keys:
            return None
        starts = [self._prompt]
        if self._header is not None and self._prompt.startswith(self._header):
            starts.append(self._header)  # the prompt introduces the reasoning in words that no finished turn shows
        for start in starts:
            found = {self._around_a_thought(keys[0], thought, start) for thought in _THOUGHTS}
            if len(found) == 1 and None not in found:
                self.closes_block = True
                return found.pop()
        return None

    def _around_a_thought(self, key: str, thought: str, start: str) -> str | None:
        """What follows a thought that stands right behind the start of a rendering."""
        text = self._render.attempt([*self._before, {**self._turn, key: thought}])
        body = "" if text is None else self._endings.split(text)[0]
        before, shown, after = body.removeprefix(start).partition(thought)
        return after if shown and body.startswith(start) and not before.strip() else None

    @cached_property
    def _header(self) -> str | None:
        return find_header(self._render, self._form, self._before)

    def _behind_an_answers_header(self) -> str | None:
        return None if self._header is None else self._behind(self._header)

    def _behind_any_header(self) -> str | None:
        """Behind what answers and calls both begin with: the policy samples the tags that tell one from the other."""
        call = call_turn(tool_name(self._render.tools), {"value": "probe"})
        text = self._render.attempt([*self._before, *self._form.fit([call])])
        if self._header is None or text is None:
            return None
        length = shared_length(self._header, text)
        return self._behind(self._header[:length]) if _TAGS.fullmatch(self._header, length) else None

    def _behind(self, header: str) -> str | None:
        if not self._body.startswith(header):
            return None
        prompt, words = self._prompt, self._body[len(header) :]
        if prompt.startswith(header):
            return self._behind_scaffold(header, prompt[len(header) :], words)
        if header.startswith(prompt):
            return words if header[len(prompt) :] == self._plain_header else None
        shared = shared_length(prompt, header)
        if prompt[shared:].endswith(header[shared:]) and _is_closed_block(prompt[shared:]):
            return None if self._thought else words
        if not self._before or not _same_after(_text(self._before[-1]), prompt, header):
            return None
        blanks, shown = _trailing_blanks(header), _trailing_blanks(prompt)
        return (blanks[len(shown) :] if blanks.startswith(shown) else "") + words

    def _behind_scaffold(self, header: str, scaffold: str, words: str) -> str | None:
        """Behind what the prompt prints after the turn's header, and the finished turn does not."""
        if not scaffold.strip():
            return _unprinted(scaffold, words)
        if scaffold == self._plain_header:
            return words
        if self._thought and words.lstrip().startswith(self._thought.strip()) and not _CLOSES.search(scaffold):
            return words
        if _is_closed_block(scaffold) or self._is_never_continued(header + scaffold):
            return None if self._thought else words
        mark = self._closing_mark(scaffold)
        if mark is None or mark in _text(self._turn):
            return None if mark is None else self._as_written(scaffold, mark, words)
        self.closes_block = not self._thought
        return self._thought + mark + words

    def _as_written(self, scaffold: str, mark: str, words: str) -> str | None:
        """A turn whose text holds its reasoning, of which the template shows only what follows."""
        text = _text(self._turn)
        if self._thought or words.strip() != text.rpartition(mark)[2].strip():
            return None
        self.printed = scaffold
        return text.removeprefix(scaffold)

    def _is_never_continued(self, prompt: str) -> bool:
        """Whether reasoning is shown, and never behind such a prompt: it leaves no block open."""
        turns = self._form.thinking_turns()
        texts = [self._render.attempt([*self._before, *self._form.fit([turn])]) for turn in turns]
        shown = [text for text in texts if text is not None]
        return bool(shown) and not any(text.startswith(prompt) for text in shown)

    def _closing_mark(self, scaffold: str) -> str | None:
        """What ends the block that a prompt opens, under a template that never shows reasoning.

        Such a template reads a sampled text by that mark: it drops what stands before it.
        """
        tag = _TAG.fullmatch(scaffold.rstrip())
        mark = tag and _closing(tag[1])
        if not mark:
            return None
        answers = [{**ANSWER, "content": words} for words in (f"{_THOUGHTS[0]}{mark}answer", "answer")]
        first, second = (self._render.attempt([*self._before, *self._form.fit([answer])]) for answer in answers)
        return mark if first is not None and first == second else None

    @cached_property
    def _plain_header(self) -> str | None:
        """What a first answer continues, behind the words of the user."""
        asked, prompt = self._render.attempt([USER]), self._render.attempt([USER], generation_prompt=True)
        answered = self._render.attempt(self._form.fit([USER, ANSWER]))
        if asked is None or prompt is None or answered is None:
            return None
        header = prompt.removeprefix(asked)
        return header if prompt.startswith(asked) and header.strip() and answered.startswith(prompt) else None

    def _but_for_blanks(self) -> str | None:
        """Where prompt and finished turn differ in nothing but blanks."""
        at = 0
        for letter in "".join(self._prompt.split()):
            while at < len(self._body) and self._body[at].isspace():
                at += 1
            if not self._body.startswith(letter, at):
                return None
            at += 1
        words = _unprinted(_trailing_blanks(self._prompt), self._body[at:])
        opener = self._endings.opener
        return None if opener is not None and words.lstrip().startswith(opener) else words


def thought_of(turn: Message) -> str:
    """A turn's reasoning."""
    return next((str(turn[key]) for key in REASONING if turn.get(key)), "")


def find_header(render: Renderer, form: Form, before: Sequence[Message]) -> str | None:
    """What a template prints before the words of an answer."""
    answers = form.fit([{"role": "assistant", "content": f"{letter} probe"} for letter in "AB"])
    first, second = (render.attempt([*before, answer]) for answer in answers)
    return None if first is None or second is None or first == second else commonprefix([first, second])


def shared_length(first: str, second: str) -> int:
    """How much two renderings share, without the beginning of a token or tag."""
    shared = commonprefix([first, second])
    opened = max(shared.rfind("<"), shared.rfind("["))
    return opened if opened > max(shared.rfind(">"), shared.rfind("]")) else len(shared)


def _is_closed_block(scaffold: str) -> bool:
    """Whether a scaffold is an opening tag, blanks, and the closing tag of the same name."""
    tag = _TAG.match(scaffold)
    return tag is not None and scaffold[tag.end() :].strip() == _closing(tag[1])


def _closing(tag: str) -> str:
    """The tag that closes what this one opens."""
    for begins, ends in (("START_", "END_"), ("begin_", "end_")):
        if tag.startswith(f"<|{begins}"):
            return tag.replace(begins, ends, 1)
    return f"{tag[0]}/{tag[1:]}"


def _unprinted(printed: str, words: str) -> str:
    """Words without the blanks before them that were printed already."""
    lead = words[: len(words) - len(words.lstrip())]
    if lead.startswith(printed):
        return words[len(printed) :]
    return words.lstrip() if printed.startswith(lead) or printed.endswith(lead) else words


def _same_after(words: str, first: str, second: str) -> bool:
    """Whether two renderings are the same from the last message's words on, but for blanks."""
    shared = common_suffix(*("".join(text.split()) for text in (first, second)))
    return bool(words.strip()) and "".join(words.split()) in shared


def _text(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _trailing_blanks(text: str) -> str:
    return text[len(text.rstrip()) :]
