"""A reader of calls in the format that a chat template prints, learned from samples of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .json_bodies import NamedBody, RecordBody
from .literals import Literals, flexible
from .python_body import PythonBody
from .reading import Call, Reading, Sampled, UnreadableCallError
from .samples import SAMPLE, SAYS, THINKS, VALUE, WORTH, Samples
from .tagged_body import TaggedBody


class Body(Protocol):
    """A call from its name, or from its object, to the end of its arguments."""

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where a sample's calls stand."""
        ...

    def read(
        self, text: str, at: int, tools: Sequence[Mapping[str, Any]], after: Sequence[re.Pattern[str]]
    ) -> tuple[list[Call], int]:
        """The calls at a place and where they end, given what may follow; `ValueError` where there are none."""
        ...


@dataclass(frozen=True)
class Thought:
    """How a template prints reasoning before the words of a turn.

    Attributes:
        opening (`re.Pattern`): what stands before it, where the prompt does not.
        closing (`re.Pattern`): what stands behind it.
        key (`str`): the message's key for it.
    """

    opening: re.Pattern[str]
    closing: re.Pattern[str]
    key: str

    @classmethod
    def learn(cls, samples: Samples, literals: Literals, opening: str) -> Thought | None:
        """From a turn that thinks, in a template whose calls have an opening; `None` where reasoning is not shown."""
        if not samples.reasoning_keys:
            return None
        for calls, content in (((), SAYS), ((SAMPLE,), SAYS), ((SAMPLE,), "")):
            text = samples.calls(*calls, content=content, reasoning=THINKS) or ""
            before, _, rest = text.partition(THINKS)
            end = re.search(flexible(opening) if calls else SAYS, rest) if rest else None
            between = re.split(SAYS, rest[: end.start()])[0] if end is not None else ""
            if literals.pieces(between):
                lead = re.compile(flexible(before, value_after=True))
                behind = re.compile(flexible(between, value_before=True, value_after=True))
                return cls(lead, behind, samples.reasoning_key)
        return None

    def split(self, text: str, limit: int) -> tuple[str, int]:
        """The reasoning in a text whose first call begins at `limit`, and where what follows it begins."""
        closing = self.closing.search(text, 0, limit)
        if closing is None:
            return "", 0
        opening = self.opening.match(text)
        start = opening.end() if opening is not None and opening.end() <= closing.start() else 0
        return text[start : closing.start()], closing.end()

    def end(self, text: str) -> int:
        """Where the reasoning ends with which a text begins, 0 where it does not: a call in it is only thought of."""
        opens = not self.opening.pattern.strip(r"\sn*?") or (lead := self.opening.match(text)) and lead[0].strip()
        closing = self.closing.search(text) if opens else None
        return closing.end() if closing is not None else 0


class LearnedReader:
    """Reads calls as a chat template prints them.

    A call that the template would print otherwise, but for blanks, is the policy's mistake.

    Args:
        body ([`Body`]): what a call is made of.
        samples ([`Samples`]): turns of the template.

    Raises:
        `ValueError`: if no sample holds a call of this kind.
    """

    name = "the format of the chat template"

    def __init__(self, body: Body, samples: Samples):
        literals = Literals(samples.added)
        frame = _Frame.of(body, samples, literals)
        self._body = body
        # One that is no more than a bracket opens a call at the beginning of the words only
        self._openings = tuple((re.compile(flexible(text)), len(text.strip()) < 3) for text in frame.openings)
        self._begun = re.compile(re.escape(frame.marker)) if frame.marker else None
        lead = getattr(body, "lead", "")
        if lead and not frame.openings[0].strip():  # the object itself is the mark
            self._begun = re.compile(flexible(lead).strip())
            self._openings = ((re.compile(rf"\s*(?={flexible(lead)})"), False),)
        self._closing = re.compile("|".join(f"(?:{flexible(text)})" for text in frame.closings))
        self._between = re.compile(flexible(frame.between)) if frame.between else None
        self._after = frame.following()
        self._head = re.compile(flexible(samples.head)) if literals.pieces(samples.head) else None
        self._thought = Thought.learn(samples, literals, frame.openings[0])

    def read(self, turn: Sampled) -> Reading:
        text = turn.text
        first, calls, end = self._first(turn)
        reasoning, start = self._thought.split(text, first) if self._thought is not None else ("", 0)
        said = text[start:first]
        if not reasoning and self._head is not None and (head := self._head.match(said)):
            said = said[head.end() :]
        while calls and (more := self._next(text, end, turn)) is not None:
            further, end = more
            calls += further
        rest = text[end:] if calls else ""
        if calls and rest.strip():
            said = said.rstrip() + rest
        if self._begun is not None and (begun := self._begun.search(said)):
            raise UnreadableCallError(f"A call was begun with {begun[0]} and cannot be read.")
        key = self._thought.key if self._thought is not None else "reasoning_content"
        return Reading(said.strip() if calls else said, calls, reasoning, key)

    def _first(self, turn: Sampled) -> tuple[int, list[Call], int]:
        """Where the first call's opening stands, the call, and its end; the end of the text where there is none."""
        text, failure = turn.text, None
        begin = self._thought.end(text) if self._thought is not None else 0
        for match in self._candidates(text, begin):
            try:
                calls, end = self._body.read(text, match.end(), turn.tools, self._after)
                return match.start(), calls, self._closed(text, end)
            except (ValueError, RecursionError) as error:
                failure = error
        if failure is not None and self._begun is not None and self._begun.search(text, begin):
            raise UnreadableCallError(str(failure)) from failure
        return len(text), [], len(text)

    def _candidates(self, text: str, begin: int) -> Iterator[re.Match[str]]:
        starts = [start for start in self._starts(text) if start >= begin]
        for opening, anchored in self._openings:
            if anchored:
                yield from (match for start in starts if (match := opening.match(text, start)) is not None)
            else:
                yield from opening.finditer(text, begin)

    def _starts(self, text: str) -> list[int]:
        """Where a call without a mark of its own may begin: at the beginning of the words."""
        starts = {0}
        if self._thought is not None:
            starts.add(self._thought.split(text, len(text))[1])
        if self._head is not None and (head := self._head.match(text)):
            starts.add(head.end())
        return sorted(starts)

    def _closed(self, text: str, end: int) -> int:
        """Where the closing ends that must follow a call."""
        if self._between is not None and self._between.match(text, end):
            return end
        closing = self._closing.match(text, end)
        if closing is None:
            raise ValueError("The call is not closed.")
        return closing.end()

    def _next(self, text: str, end: int, turn: Sampled) -> tuple[list[Call], int] | None:
        """The calls that follow the last one, and their end."""
        for pattern in (self._between, *(opening for opening, _ in self._openings)):
            match = pattern.match(text, end) if pattern is not None else None
            if match is None or not text[end:].strip():
                continue
            try:
                calls, after = self._body.read(text, match.end(), turn.tools, self._after)
                return calls, self._closed(text, after)
            except (ValueError, RecursionError) as error:
                if self._begun is not None and self._begun.search(text, end):
                    raise UnreadableCallError(str(error)) from error
        return None


@dataclass(frozen=True)
class _Frame:
    """The literal text around calls: what opens the first, what closes the last, what stands between two."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    between: str
    marker: str

    @classmethod
    def of(cls, body: Body, samples: Samples, literals: Literals) -> _Frame:
        before, after = _around(body, samples.calls(SAMPLE))
        if before is None:
            raise ValueError("The samples hold no call of this kind.")
        openings, closings, between = _openings(before, body, samples, literals), [after], ""
        two = samples.calls(SAMPLE, {"prbalpha": WORTH}) or ""
        spans = body.spans(two)
        if len(spans) == 2:
            between, last = two[spans[0][1] : spans[1][0]], two[spans[1][1] :]
            close = literals.prefix(last, between)[0]
            closings += [close] if close.strip() and literals.pieces(close) != literals.pieces(after) else []
            opening = literals.suffix(between, openings[0])
            openings += [opening] if opening.strip() and opening.strip() != openings[0].strip() else []
        marker = next(filter(None, map(literals.marker, openings)), "")
        return cls(tuple(openings), tuple(closings), between, marker)

    def following(self) -> tuple[re.Pattern[str], ...]:
        """What may follow a call: another one, or the end of the turn; failing these, what closes it."""
        closings = [rf"\s*(?:{flexible(text)})" for text in self.closings]
        strict = [rf"{closing}\s*\Z" for closing in closings]
        more = [rf"\s*(?:{flexible(self.between)})"] if self.between.strip() else []
        lax = [closing for closing, text in zip(closings, self.closings, strict=True) if text.strip()]
        return tuple(re.compile("|".join(options)) for options in ([*strict, *more], [*lax, *more, r"\s*\Z"]))


def _around(body: Body, text: str | None) -> tuple[str | None, str]:
    spans = body.spans(text) if text else []
    if text is None or not spans:
        return None, ""
    return text[: spans[0][0]], text[spans[0][1] :]


def _openings(before: str, body: Body, samples: Samples, literals: Literals) -> list[str]:
    """What opens a call: what stands before it whether or not the turn says something, and behind what it says."""
    said, _ = _around(body, samples.calls(SAMPLE, content=SAYS))
    if said is None or SAYS not in said:
        return [before.removeprefix(samples.head)]
    behind = said.rpartition(SAYS)[2]
    shared = literals.suffix(before, behind)
    if shared.strip() or not behind.strip():
        return [shared]
    return [before.removeprefix(samples.head), behind]


def learned_readers(samples: Samples) -> Iterator[LearnedReader]:
    """Readers of every kind of call that the samples may hold."""
    text = samples.calls(SAMPLE)
    if not text or VALUE not in text:
        return
    literals = Literals(samples.added)
    bodies: list[Body | None] = [
        RecordBody.learn(text),
        NamedBody.learn(text),
        PythonBody.learn(text, escaped=True),
        PythonBody.learn(text, escaped=False),
        TaggedBody.learn(samples, literals),
        TaggedBody.learn(samples, literals, cdata=True) if "CDATA" in samples.chat_template else None,
    ]
    for body in filter(None, bodies):
        try:
            yield LearnedReader(body, samples)
        except ValueError:
            continue
