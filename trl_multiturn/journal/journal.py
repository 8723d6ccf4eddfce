"""What has finished is never lost and never repeated: an append-only journal of trajectories.

A folder holds numbered shards of JSON lines, one file per scope (iteration and policy) with the settings that its
trajectories were made with, and, once written, the dataset. Each process appends to a shard of its own, so a line can
only be torn at a shard's end: that trajectory did not finish. Each line carries a checksum. A trajectory is a line
from the moment it finishes; its verdict is another line.

Killed at any moment and started again, a run loses nothing that finished, and [`Journal.write_dataset`] writes the
same bytes as an undisturbed run would: rows are sorted by their place, and wall-clock times stay in the journal.

Reading holds one trajectory (or one prompt's) and, for the order, 24 bytes for each of the others.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ..distributed.durable import sync_entry, write_whole, written_whole
from ..errors import JournalError as JournalError
from ..trajectory import Trajectory, Verdict
from .index import LineIndex, ShardReader
from .sync import BackgroundSync


logger = logging.getLogger(__name__)

_LINE = re.compile(rb'\{"crc32":"([0-9a-f]{8})",("kind":"(\w+)","scope":"([^"]*)","prompt":(\d+),"sample":(\d+),.*\})')
_ROWS_PER_GROUP = 1000
# what a verdict adds to a trajectory's `info`
_OF_VERDICTS = ("rewards", "reward_errors", "verifiers", "prompt_fingerprint")


@dataclass(frozen=True)
class Places:
    """Where the trajectories of an iteration are.

    Attributes:
        prompts (`range`): indices of its prompts.
        samples (`dict[str, list[range]]`): by scope, the samples of each prompt.
    """

    prompts: range
    samples: dict[str, list[range]]

    @property
    def count(self) -> int:
        """How many trajectories there are."""
        return len(self.prompts) * sum(len(span) for spans in self.samples.values() for span in spans)


class Journal:
    """Append-only store of finished trajectories. Opening it touches nothing; the first write makes the folder.

    Args:
        folder (`str` or `os.PathLike`):
            Where the journal is. Several processes may write to one folder, each to shards of its own.
        sync_seconds (`float`, *optional*, defaults to `1.0`):
            Every line is handed to the operating system at once, so that a killed process loses nothing. To survive a
            power failure too, each line is synced to disk, in a thread, about this long after it was written, and the
            last ones before [`generate_trajectories`] returns; 0 syncs each line before going on.
    """

    def __init__(self, folder: str | os.PathLike, sync_seconds: float = 1.0):
        self.folder = Path(folder)
        self.sync_seconds = sync_seconds
        self._descriptor: int | None = None
        self._size = 0
        self._sync: BackgroundSync | None = None

    # Writing

    def claim(
        self,
        scope: str,
        settings: Mapping[str, Any],
        decisive: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        """Binds a scope to the settings its trajectories are made with.

        Args:
            scope (`str`):
                Iteration and policy, e.g. `"0/current"`.
            settings (`Mapping`):
                JSON values: what decides which trajectories come out.
            decisive (`Callable`, *optional*):
                What of the settings must not change, where some of them may; all by default.

        Raises:
            [`JournalError`]: if the scope was begun with other settings; the message names them.
        """
        path = self.folder / f"scope-{re.sub(r'[^0-9A-Za-z._-]', '-', scope)}.json"
        settings = json.loads(json.dumps(dict(settings), default=str))
        if path.exists():
            self._refuse_other_settings(scope, path, dict(settings), decisive)
            return
        with _explained(self.folder):
            write_whole(path, json.dumps(settings, indent=2, sort_keys=True).encode())

    def append(self, scope: str, trajectory: Trajectory) -> None:
        """Writes a finished trajectory, whose `info` holds `prompt_index` and `sample_index`.

        Raises:
            [`JournalError`]: if it cannot be written (disk full, folder read-only). The journal stays readable.
        """
        self._write("trajectory", scope, trajectory, trajectory.to_dict())

    def judge(self, scope: str, trajectory: Trajectory) -> None:
        """Writes the verdict on a trajectory that was appended before."""
        verdict = {"verdict": trajectory.verdict.value, "reward": trajectory.reward}
        verdict |= {name: trajectory.info[name] for name in _OF_VERDICTS if name in trajectory.info}
        self._write("verdict", scope, trajectory, verdict)

    def sync(self) -> None:
        """Waits until everything written so far is on the disk."""
        if self._sync is not None:
            with _explained(self.folder):
                self._sync.finish()

    def close(self) -> None:
        """Syncs and closes this process's shard. A later write opens another."""
        if self._descriptor is not None:
            try:
                self.sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = self._sync = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    # Reading

    def read(self, scope: str | None = None) -> Iterator[Trajectory]:
        """Trajectories of a scope, or of all, by scope, prompt and sample; one at a time, so that memory stays flat.

        Raises:
            [`JournalError`]: if a line that is not a shard's last one is damaged.
        """
        for _, trajectory in self._read(scope, by_prompt=False):
            yield trajectory

    def read_by_prompt(self, places: Places | None = None) -> Iterator[list[Trajectory]]:
        """The trajectories of one prompt after another, each prompt's of all scopes together, by scope and sample.

        Memory holds those of one prompt at a time.

        Args:
            places ([`Places`], *optional*):
                The only ones to read; all by default.

        Raises:
            [`JournalError`]: if a line that is not a shard's last one is damaged.
        """
        for prompt, group in groupby(self._read(None, by_prompt=True, places=places), key=lambda found: found[0]):
            if places is None or prompt in places.prompts:
                yield [trajectory for _, trajectory in group]

    def missing(self, places: Places) -> dict[int, int]:
        """How many trajectories are not there, by prompt.

        Raises:
            [`JournalError`]: if a line that is not a shard's last one is damaged.
        """
        _, index = self._scan(self._shards())
        missing: Counter[int] = Counter()
        for scope, spans in places.samples.items():
            prompts, samples = index.finished(scope)
            for span in spans:
                there = np.zeros((len(places.prompts), len(span)), bool)
                wanted = (prompts < len(places.prompts)) & (samples >= span.start) & (samples < span.stop)
                there[prompts[wanted], samples[wanted] - span.start] = True
                for prompt in np.flatnonzero(~there.all(1)).tolist():
                    missing[prompt] += int((~there[prompt]).sum())
        return dict(missing)

    def write_dataset(self, path: str | os.PathLike | None = None) -> Path:
        """Writes all trajectories to a Parquet file, by scope, prompt and sample; [`read_dataset`] reads it.

        The bytes depend on the trajectories alone: not on the order in which they finished, nor on restarts.

        Args:
            path (`str` or `os.PathLike`, *optional*):
                `trajectories.parquet` in the journal's folder by default. An older file is replaced at once, when the
                new one is complete.
        """
        path = self.folder / "trajectories.parquet" if path is None else Path(path)
        with _explained(self.folder):
            write_parquet(self.read(), path)
        return path

    # Lines

    def _write(self, kind: str, scope: str, trajectory: Trajectory, record: dict[str, Any]) -> None:
        prompt, sample = trajectory.info["prompt_index"], trajectory.info["sample_index"]
        text = json.dumps(record, separators=(",", ":"))
        body = f'"kind":"{kind}","scope":"{scope}","prompt":{prompt},"sample":{sample},"record":{text}}}'.encode()
        line = b'{"crc32":"%08x",%s\n' % (zlib.crc32(body), body)
        with _explained(self.folder):
            descriptor = self._open_shard()
            try:
                written = 0
                while written < len(line):
                    written += os.write(descriptor, line[written:])
            except OSError:
                os.ftruncate(descriptor, self._size)  # a half-written line must not precede a later one
                raise
            self._size += len(line)
            if self._sync is not None:
                self._sync.written()

    def _open_shard(self) -> int:
        """A new shard: one that was written by another run may end in a torn line."""
        if self._descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            # After the last one, also where damaged ones were taken away: later lines say more
            names = (re.match(r"shard-(\d+)", shard.name) for shard in self._shards())
            number = max((int(name[1]) + 1 for name in names if name), default=0)
            while self._descriptor is None:
                shard = self.folder / f"shard-{number:06d}.jsonl"
                try:
                    self._descriptor = os.open(shard, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
                except FileExistsError:  # another process was quicker
                    number += 1
            self._size, self._sync = 0, BackgroundSync(self._descriptor, self.sync_seconds)
            sync_entry(self.folder)
        return self._descriptor

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("shard-*.jsonl"))

    def _read(
        self, scope: str | None, by_prompt: bool, places: Places | None = None
    ) -> Iterator[tuple[int, Trajectory]]:
        """Trajectories in order, each with its prompt's index."""
        shards = self._shards()
        starts, index = self._scan(shards)
        order = index.latest(scope, by_prompt, _scope_order, None if places is None else places.samples)
        del index
        with ShardReader(shards, starts) as lines:
            for entry in order:
                prompt, place, verdict_place = entry.tolist()
                with _explained(self.folder):
                    line = lines.line(place)
                    verdict = lines.line(verdict_place) if verdict_place >= 0 else None
                yield prompt, _trajectory(line, verdict)

    def _scan(self, shards: list[Path]) -> tuple[list[int], LineIndex]:
        """Checks every line; the position of each shard's first line, and where everything is."""
        index, starts, position = LineIndex(), [], 0
        for shard in shards:
            starts.append(position)
            with _explained(self.folder), open(shard, "rb") as file:
                for number, line in enumerate(file, 1):
                    match = _checked(line)
                    if match is None:
                        self._refuse_damage(shard, number, last=not file.read(1))
                        break
                    is_verdict = match[3] != b"trajectory"
                    index.add(match[4].decode(), int(match[5]), int(match[6]), position, is_verdict)
                    position += len(line)
        return starts, index

    def _refuse_damage(self, shard: Path, number: int, last: bool) -> None:
        if last:
            logger.warning("%s ends in a torn line: that trajectory is rolled out again.", shard)
            return
        raise JournalError(
            f"Line {number} of {shard} is damaged, so the trajectories in it cannot be trusted. Restore the file, or "
            "move it away: what it held is then rolled out again."
        )

    def _refuse_other_settings(
        self,
        scope: str,
        path: Path,
        settings: dict[str, Any],
        decisive: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        with _explained(self.folder):
            try:
                before = json.loads(path.read_text())
                before, settings = decisive(before), decisive(settings)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise JournalError(f"{path} is damaged ({error}). Restore it, or use another folder.") from error
        if before == settings:
            return
        changed = [
            f"`{name}`: {_brief(before.get(name))} before, {_brief(settings.get(name))} now"
            for name in sorted({*before, *settings})
            if before.get(name) != settings.get(name)
        ]
        raise JournalError(
            f"The journal in {self.folder} was begun with other settings, and trajectories of both must not be mixed. "
            f"{'; '.join(changed)}. Use the earlier settings, or another folder. {self.how_to_free(scope)}"
        )

    def how_to_free(self, scope: str) -> str:
        """What to delete so that a scope is rolled out anew, and what that loses."""
        _, index = self._scan(self._shards())
        count = len(index.latest(scope))
        return f"Deleting {self.folder} rolls everything in it out anew; {count} trajectories of {scope} are lost."


def read_dataset(path: str | os.PathLike) -> list[Trajectory]:
    """The trajectories that [`Journal.write_dataset`] wrote."""
    import pyarrow.parquet as pq

    trajectories = []
    for row in pq.read_table(path).to_pylist():
        decoded = {name: json.loads(row[name]) for name in ("prompt", "completion", "info")}
        trajectories.append(Trajectory.from_dict({**row, **decoded}))
    return trajectories


def write_parquet(trajectories: Iterable[Trajectory], path: Path) -> int:
    """Writes trajectories to a Parquet file, whole or not at all, in bounded memory; returns how many there were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema(pa)
    rows: list[dict[str, Any]] = []
    count = 0
    with written_whole(path) as partial, pq.ParquetWriter(partial, schema) as writer:
        for count, trajectory in enumerate(trajectories, 1):  # noqa: B007
            rows.append(_to_row(trajectory))
            if len(rows) == _ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return count


def _scope_order(scope: str) -> list[tuple]:
    """Numbers in a scope are sorted as numbers."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in scope.split("/")]


def _trajectory(line: bytes, verdict_line: bytes | None) -> Trajectory:
    trajectory = Trajectory.from_dict(json.loads(line)["record"])
    if verdict_line is None:
        return trajectory
    verdict = json.loads(verdict_line)["record"]
    info = {**trajectory.info, **{name: verdict[name] for name in _OF_VERDICTS if name in verdict}}
    return replace(trajectory, verdict=Verdict(verdict["verdict"]), reward=verdict["reward"], info=info)


def _checked(line: bytes) -> re.Match | None:
    match = _LINE.fullmatch(line[:-1]) if line.endswith(b"\n") else None
    return match if match is not None and int(match[1], 16) == zlib.crc32(match[2]) else None


def _schema(pa: Any) -> Any:
    ids, text = pa.list_(pa.int32()), pa.string()
    return pa.schema(
        {
            "prompt": text,  # messages as JSON: Arrow would fill absent keys of tool arguments with nulls
            "completion": text,
            "prompt_ids": ids,
            "completion_ids": ids,
            "action_mask": pa.list_(pa.int8()),
            "logps": pa.list_(pa.float64()),
            "stop_reason": text,
            "verdict": text,
            "reward": pa.float64(),
            "info": text,
            "branches": pa.list_(pa.list_(pa.int32())),
        }
    )


def _to_row(trajectory: Trajectory) -> dict[str, Any]:
    row = trajectory.to_dict()
    texts = {"prompt": row["prompt"], "completion": row["completion"], "info": trajectory.provenance}
    return {**row, **{name: json.dumps(value, sort_keys=True) for name, value in texts.items()}}


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "…"


class _explained:
    """Turns an operating system's error into one that says what to do."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, OSError):
            first = error.__cause__ if isinstance(error.__cause__, OSError) else error  # in the system's own words
            raise JournalError(
                f"The journal in {self._folder} cannot be used: {first.strerror or first}. What was written before is "
                "intact. Free space or make the folder writable, and start again with the same command."
            ) from error
