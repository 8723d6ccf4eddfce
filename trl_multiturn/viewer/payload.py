"""The JSON behind the page, as `docs/viewer.md` documents it: an index of everything, and chunks read on demand."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..data.images.shown import with_thumbnails
from ..online.report import explain_reasons
from ..segments import segment_changes
from ..version import __version__
from .record import LAYERS, PairRecord, Record, Source, turn_spans
from .token_texts import other_tokenizer, token_texts


FORMAT, VERSION = "trl-multiturn-view", 1
LOGP_UNIT = 1e-5  # token numbers are whole multiples of it

_CHUNK_CHARACTERS = 400_000  # of JSON, before it is compressed
_SNIPPET = 160  # characters of a prompt that the table shows
# What a trajectory shares with the others of its policy and iteration
_SHARED = (
    "engine", "sampler", "dialect", "dialects", "tools", "verifiers", "versions", "tokenizer", "chat_template",
    "policy_revision", "policy_iteration", "policy_lag", "decoding", "environment",
)  # fmt: skip
# What a column or another part says already
_ELSEWHERE = (
    "trajectory_id", "prompt_index", "sample_index", "iteration", "policy", "seed", "turns", "tool_calls",
    "tool_errors", "dropped", "prompt_fingerprint", "process_rewards", "stop_reason", "verdict",
)  # fmt: skip
_ENUMS = ("split", "policy", "verdict", "stop_reason", "fate")


@dataclass
class Payload:
    """
    Blocks of JSON by name: `index`, `vocabulary`, `text-0`, …, `tokens-0`, …; each compressed (raw deflate).

    Attributes:
        blocks (`dict[str, bytes]`): the compressed blocks, in the order in which a page needs them.
    """

    blocks: dict[str, bytes] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return json.loads(zlib.decompress(self.blocks[name], -zlib.MAX_WBITS))

    def add(self, name: str, value: Any) -> None:
        """Compresses a JSON value into a block."""
        self.add_text(name, _json(value))

    def add_text(self, name: str, text: str) -> None:
        """Compresses JSON into a block."""
        compressor = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
        # Half of a surrogate pair, which a policy can write into a call's arguments as JSON, is in no encoding
        self.blocks[name] = compressor.compress(text.encode("utf-8", "replace")) + compressor.flush()

    def to_json(self) -> dict[str, Any]:
        """All blocks as JSON values."""
        return {name: self[name] for name in self.blocks}


def build_payload(
    source: Source, records: Iterable[Record], created: str, selection: Mapping[str, Any] | None = None
) -> Payload:
    """
    Reads the records, one at a time, into a payload.

    Args:
        source ([`Source`]):
            Where they come from.
        records (`Iterable[Record]`):
            Those to show, in order.
        created (`str`):
            When, for the page.
        selection (`Mapping`, *optional*):
            How they were chosen.
    """
    builder = _Builder(source)
    for record in records:
        builder.add(record)
    return builder.finish(created, dict(selection or {}))


class _Builder:
    """Columns grow in memory, a few hundred bytes per record; chunks are compressed as they fill."""

    def __init__(self, source: Source):
        self.source = source
        self.payload = Payload()
        self.columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self.enums: dict[str, dict[str, int]] = {name: {} for name in _ENUMS}
        self.prompts: dict[str, int] = {}
        self.snippets: list[str] = []
        self.provenance: dict[str, int] = {}
        self.places: dict[str, int] = {}  # record id -> number
        self.prompt_lengths: list[int] = []
        self.layers = dict.fromkeys(LAYERS, 0)
        self.ids: set[int] = set()
        self.texts, self.tokens = _Chunks(self.payload, "text"), _Chunks(self.payload, "tokens")
        self.foreign = False

    def add(self, record: Record) -> None:
        number = self.places[record.id] = len(self.places)
        if number == 0 and self.source.tokenizer is not None:
            self.foreign = other_tokenizer(self.source.tokenizer, record.info)
        for name, read in _COLUMNS.items():
            self.columns[name].append(read(record))
        for name, known in self.enums.items():
            self.columns[name][-1] = known.setdefault(getattr(record, name), len(known))
        self.columns["prompt"][-1] = self._prompt(record)
        shared = {name: record.info[name] for name in _SHARED if name in record.info}
        self.columns["provenance"][-1] = self.provenance.setdefault(json.dumps(shared), len(self.provenance))
        self.prompt_lengths.append(len(record.prompt_ids))
        for name in record.layers:
            self.layers[name] += 1
        self.ids.update(record.prompt_ids, record.completion_ids)
        self.texts.add(with_thumbnails(record.prompt), _text(record))
        self.tokens.add(record.prompt_ids, _tokens(record))

    def finish(self, created: str, selection: dict[str, Any]) -> Payload:
        source, blocks = self.source, self.payload.blocks
        self.texts.flush()
        self.tokens.flush()
        texts = {}
        if source.tokenizer is not None and self.ids:
            texts = token_texts(source.tokenizer, self.ids)
        self.payload.add("vocabulary", {str(token): text for token, text in texts.items()})
        self.payload.add("index", self._index(created, selection))
        last = {name: blocks.pop(name) for name in ("index", "vocabulary")}
        self.payload.blocks = {**last, **blocks}
        return self.payload

    def _index(self, created: str, selection: dict[str, Any]) -> dict[str, Any]:
        source = self.source
        return {
            "format": FORMAT,
            "version": VERSION,
            "title": source.title,
            "kind": source.kind,
            "created": created,
            "made_by": f"trl_multiturn {__version__}",
            "count": len(self.places),
            "selection": selection,
            "notes": self._notes(),
            "layers": [{"name": n, "label": LAYERS[n], "count": count} for n, count in self.layers.items() if count],
            "logp_unit": LOGP_UNIT,
            "enums": {name: list(known) for name, known in self.enums.items()},
            "reasons": self._reasons(),
            "columns": self.columns,
            "prompts": self.snippets,
            "provenance": [json.loads(text) for text in self.provenance],
            "pairs": self._pairs(),
            "iterations": [_finite(asdict(report)) for report in source.iterations],
            "start": _finite(source.start),
            "metrics": _finite(source.metrics),
            "log": _finite(_columns_of(source.log)),
            "chunks": {"text": self.texts.starts, "tokens": self.tokens.starts},
        }

    def _prompt(self, record: Record) -> int:
        known = self.prompts.setdefault(record.prompt_key, len(self.prompts))
        if known == len(self.snippets):
            self.snippets.append(_snippet(record, self.source.tokenizer))
        return known

    def _pairs(self) -> dict[str, list[Any]]:
        """The pairs of which both sides are shown, as columns."""
        rows = []
        for pair in self.source.pairs:
            if pair.chosen in self.places and pair.rejected in self.places:
                place = self.places[pair.chosen]
                shared = 0 if pair.prompt_tokens is None else pair.prompt_tokens - self.prompt_lengths[place]
                rows.append(
                    {**asdict(pair), "chosen": place, "rejected": self.places[pair.rejected], "shared": shared}
                )
        names = [name for name in PairRecord.__dataclass_fields__ if name != "prompt_tokens"] + ["shared"]
        return {name: [_number(row[name]) for row in rows] for name in names}

    def _reasons(self) -> dict[str, str]:
        """What the reasons mean for which trajectories are in no row, by fate."""
        named = {fate: fate.partition(": ")[2] for fate in self.enums["fate"] if ": " in fate}
        told = {fate: explain_reasons([name]) for fate, name in named.items()}
        return {fate: lines[0].removeprefix(f"{named[fate]}: ") for fate, lines in told.items() if lines}

    def _notes(self) -> list[str]:
        firsts = {note.partition(":")[0].partition(" first")[0]: note for note in reversed(self.source.notes)}
        notes = list(firsts.values())  # the first of each kind
        if self.ids and self.source.tokenizer is None:
            notes.append("No tokenizer was found, so tokens are shown as ids. `--tokenizer` takes a name or a folder.")
        if self.foreign:
            notes.append("The tokenizer is another than that of the rollouts, so the texts of tokens may be wrong.")
        return notes


class _Chunks:
    """One kind of chunks, as JSON; prompts that follow each other are kept once."""

    def __init__(self, payload: Payload, kind: str):
        self.payload, self.kind = payload, kind
        self.starts: list[int] = []
        self.count = 0
        self._clear()

    def add(self, prompt: Any, entry: dict[str, Any]) -> None:
        text = _json(prompt)
        if not self.prompts or self.prompts[-1] != text:
            self.prompts.append(text)
            self.size += len(text)
        self.entries.append(_json({"prompt": len(self.prompts) - 1, **entry}))
        self.size += len(self.entries[-1])
        self.count += 1
        if self.size > _CHUNK_CHARACTERS:
            self.flush()

    def flush(self) -> None:
        if self.entries:
            first = self.count - len(self.entries)
            prompts, entries = ",".join(self.prompts), ",".join(self.entries)
            text = f'{{"first":{first},"prompts":[{prompts}],"entries":[{entries}]}}'
            self.payload.add_text(f"{self.kind}-{len(self.starts)}", text)
            self.starts.append(first)
        self._clear()

    def _clear(self) -> None:
        self.prompts: list[str] = []
        self.entries: list[str] = []
        self.size = 0


# One value per record, in the order of a table's columns; those that `_Builder.add` fills in stand as `None`
_COLUMNS: dict[str, Callable[[Record], Any]] = {
    "id": lambda r: r.id,
    "split": lambda r: None,
    "iteration": lambda r: r.iteration,
    "policy": lambda r: None,
    "prompt": lambda r: None,
    "prompt_index": lambda r: r.prompt_index,
    "sample": lambda r: r.sample,
    "verdict": lambda r: None,
    "reward": lambda r: _number(r.reward),
    "answer": lambda r: r.answer and r.answer[:_SNIPPET],
    "turns": lambda r: r.num_turns,
    "calls": lambda r: " ".join(r.info.get("tool_statuses", [])),
    "malformed": lambda r: r.info.get("malformed_calls", 0),
    "stop_reason": lambda r: None,
    "fate": lambda r: None,
    "tokens": lambda r: len(r.completion_ids),
    "sampled": lambda r: sum(map(bool, r.action_mask)),
    "prompt_tokens": lambda r: len(r.prompt_ids),
    "seconds": lambda r: _rounded(r.info.get("timing", {}).get("seconds")),
    "tool_seconds": lambda r: _rounded(r.info.get("timing", {}).get("tool_seconds")),
    "seed": lambda r: str(r.info["seed"]) if "seed" in r.info else None,  # JavaScript's numbers have 53 bits
    "provenance": lambda r: None,
}


def _text(record: Record) -> dict[str, Any]:
    info = {name: value for name, value in record.info.items() if name not in (*_SHARED, *_ELSEWHERE)}
    timing = info.pop("timing", None)
    entry: dict[str, Any] = {"completion": with_thumbnails(record.completion), "info": info}
    if timing:
        entry["timing"] = {
            name: [_rounded(x) for x in value] if isinstance(value, list) else _rounded(value)
            for name, value in timing.items()
        }
    return entry


def _tokens(record: Record) -> dict[str, Any]:
    """Ids, turns as `start, stop, start, stop, …`, and layers with one whole number per *sampled* token; of each
    further segment its first token, the tokens that it reads again, and how many it no longer reads."""
    sampled = np.flatnonzero(record.action_mask)
    layers = {name: _units(np.asarray(numbers, float)[sampled]) for name, numbers in record.layers.items()}
    entry: dict[str, Any] = {
        "ids": record.completion_ids,
        "turns": [edge for span in turn_spans(record.action_mask) for edge in span],
        "layers": layers,
    }
    if record.kept is not None and record.kept < len(record.completion_ids):
        entry["kept"] = record.kept
    if record.branches:
        length = len(record.prompt_ids) + len(record.completion_ids)
        changes = segment_changes(record.branches, record.action_mask, length)
        entry["segments"] = [
            [start - len(record.prompt_ids), change.kept, len(change.removed)]
            for (start, _), change in zip(record.branches, changes, strict=True)
        ]
    return entry


def _snippet(record: Record, tokenizer: Any) -> str:
    """The beginning of the prompt's last message, which says what a trajectory is about."""
    for message in reversed(record.prompt):
        if text := _content(message):
            return " ".join(text.split())[:_SNIPPET]
    if record.prompt_ids and tokenizer is not None:
        return " ".join(tokenizer.decode(record.prompt_ids, skip_special_tokens=True).split())[-_SNIPPET:]
    return f"{len(record.prompt_ids)} tokens" if record.prompt_ids else ""


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def _columns_of(log: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What a trainer logged as columns of the same length, one per number; `None` where an entry has none."""
    names = dict.fromkeys(name for entry in log for name, value in entry.items() if isinstance(value, (int, float)))
    return {name: [entry.get(name) for entry in log] for name in names}


def _units(numbers: np.ndarray) -> list[int | None]:
    """Numbers as whole multiples of the unit; `None` for what is no number."""
    units = numbers / LOGP_UNIT
    if np.isfinite(units).all():
        return np.rint(units).astype(np.int64).tolist()
    return [round(unit) if math.isfinite(unit) else None for unit in units.tolist()]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(value: Any) -> str:
    """JSON of a value that was read from JSON, in which Python lets NaN and infinities stand: they become text."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value, str), separators=(",", ":"), ensure_ascii=False)


def _finite(value: Any, instead: Callable[[float], Any] = lambda _: None) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(each, instead) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each, instead) for each in value]
    return instead(value) if isinstance(value, float) and not math.isfinite(value) else value
