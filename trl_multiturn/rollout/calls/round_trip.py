"""What a reader gives back of the turns that a chat template prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .reading import CallReader, Reading, Sampled
from .samples import SAMPLE, SAYS, SCHEMA, THINKS, VALUE, WORTH, Samples


# Code as policies write it: indentation, every bracket and quote, a backslash, blanks at both ends
CODE = "  def f(x):\n    return {'a': [x(\"q\", 1)], 'b': '\\n'}  # it's <b>\n\n"
TEXTS = {"text": VALUE, "code": CODE, "digits": "75001", "true": "true", "unicode": "é 数 “x”", "json": '{"a": [1]}'}
VALUES = {"prbcount": 3, "prbflag": True, "prblist": [1, 2], "prbmore": {"k": "v"}, "prbrate": 0.5}


@dataclass(frozen=True)
class Trial:
    """A turn and what is to be read in it.

    Attributes:
        name (`str`): what is tried.
        turn ([`Sampled`]): the turn.
        arguments (`list[dict]`): arguments of its calls.
        content (`str`), reasoning (`str`): what it says and thinks.
    """

    name: str
    turn: Sampled
    arguments: list[Mapping[str, Any]]
    content: str = ""
    reasoning: str = ""

    def faults(self, reading: Reading) -> bool:
        """Whether a reading differs."""
        calls = [call["function"] for call in reading.calls]
        return (
            not _same([call["arguments"] for call in calls], self.arguments)
            or any(call["name"] != SCHEMA["function"]["name"] for call in calls)
            or reading.content.strip() != self.content
            or reading.reasoning.strip() != self.reasoning
        )


@dataclass(frozen=True)
class ReaderFit:
    """How a reader fits a chat template.

    Attributes:
        reader ([`CallReader`]): the reader.
        faults (`tuple[str]`): trials that it does not give back.
        parallel (`bool`): whether the template shows several calls in one turn, and the reader reads them.
    """

    reader: CallReader
    faults: tuple[str, ...]
    parallel: bool


class RoundTrip:
    """Trials of readers under one chat template.

    Args:
        samples ([`Samples`]): turns of the template.
    """

    def __init__(self, samples: Samples):
        self._samples = samples

    @cached_property
    def possible(self) -> bool:
        """Whether the template prints a call that a policy can sample in one turn."""
        return self._call("text", {"prbalpha": VALUE}) is not None

    def fit(self, reader: CallReader) -> ReaderFit | None:
        """How a reader fits, `None` where it does not even read the simplest call."""
        trials = self._trials
        if not trials or self._faults(reader, trials[0]):
            return None
        faults = [trial.name for trial in trials if self._faults(reader, trial)]
        two = self._turn("parallel calls", [SAMPLE, {"prbalpha": WORTH}])
        shown = two is not None and all(word in two.turn.text for word in (VALUE, WORTH))
        parallel = two is not None and shown and not self._faults(reader, two)
        return ReaderFit(reader, (*faults, *(["parallel calls"] if shown and not parallel else [])), parallel)

    @cached_property
    def _trials(self) -> list[Trial]:
        return list(filter(None, self._all()))

    def _all(self) -> Iterator[Trial | None]:
        for name, text in TEXTS.items():
            yield self._call(name, {"prbalpha": text})
        yield self._call("two arguments", {"prbalpha": VALUE, "prbbeta": WORTH})
        yield self._call("numbers and lists", VALUES)
        yield self._call("no arguments", {})
        simple = self._call("text", SAMPLE)
        if simple is not None:  # text that looks like the end of the call
            end = simple.turn.text.rpartition(VALUE)[2]
            yield self._call("the end of a call in text", {"prbalpha": f"{VALUE}{end} {WORTH}"}, shown=WORTH)
        yield self._turn("words beside a call", [SAMPLE], content=SAYS)
        yield self._turn("reasoning before a call", [SAMPLE], reasoning=THINKS)
        yield self._turn("an answer", [], content=SAYS)
        yield self._turn("a reasoned answer", [], content=SAYS, reasoning=THINKS)

    def _call(self, name: str, arguments: Mapping[str, Any], shown: str = "") -> Trial | None:
        trial = self._turn(name, [arguments])
        return trial if trial is None or shown in trial.turn.text else None

    def _turn(
        self, name: str, arguments: list[Mapping[str, Any]], content: str = "", reasoning: str = ""
    ) -> Trial | None:
        """A trial, `None` where the template leaves a part of it out or no turn could hold it."""
        if reasoning and not self._samples.reasoning_keys:
            return None
        text = self._samples.calls(*arguments, content=content, reasoning=reasoning)
        if text is None or any(part not in text for part in (content, reasoning)):
            return None
        if arguments and SCHEMA["function"]["name"] not in text:
            return None
        ids = self._samples.tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = self._samples.ends
        if set(ids) & set(ends):  # sampling would end before the call
            return None
        end = ends[-1] if arguments else ends[0]
        turn = Sampled(text, [*ids, end], self._samples.prompt_ids, [SCHEMA])
        return Trial(name, turn, arguments, content, reasoning)

    def _faults(self, reader: CallReader, trial: Trial) -> bool:
        try:
            return trial.faults(reader.read(trial.turn))
        except Exception:  # a parser of somebody else's may raise anything
            return True


def _same(first: Any, second: Any) -> bool:
    """Equality that tells `True` from `1`."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    return type(first) is type(second) and first == second
