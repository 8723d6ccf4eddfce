"""Checkpoints that are whole or not there: what a run that was killed while it wrote one goes on from."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import rotate_checkpoints

from ...distributed.checksums import find_damage, write_checksums
from ...distributed.durable import sync, sync_entry


logger = logging.getLogger(__name__)

_STATE_FILE = "trainer_state.json"


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The last complete `checkpoint-*` folder in `output_dir`, or `None`.

    `transformers.trainer_utils.get_last_checkpoint` also returns one that was being written when its process was
    killed, from which nothing can resume.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(folders, key=_step, reverse=True):
        if not is_complete(folder):
            logger.warning("%s is passed over: the run was stopped while it was being written.", folder)
        elif damage := find_damage(folder):
            logger.warning("%s is passed over: %s.", folder, damage)
        else:
            return str(folder)
    return None


def is_complete(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint was written to its end."""
    if _marker(Path(checkpoint)).exists():
        return False
    try:
        return isinstance(json.loads(Path(checkpoint, _STATE_FILE).read_bytes()), dict)
    except (OSError, ValueError):
        return False


@contextmanager
def being_written(trainer: Any, checkpoint: Path) -> Iterator[None]:
    """Marks a checkpoint as incomplete while the body writes it, on all processes of `trainer` together.

    Older checkpoints are deleted (`save_total_limit`) only when this one stands.
    """
    writes, limit = trainer.args.should_save, trainer.args.save_total_limit
    if writes:
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        _marker(checkpoint).touch()
        sync_entry(checkpoint.parent)
    trainer.accelerator.wait_for_everyone()
    trainer.args.save_total_limit = None
    try:
        yield
    finally:
        trainer.args.save_total_limit = limit
    trainer.accelerator.wait_for_everyone()
    if writes:
        if (arguments := checkpoint / TRAINING_ARGS_NAME).exists():
            torch.save(trainer.args, arguments)  # the body wrote them without the limit
        write_checksums(checkpoint)
        sync(checkpoint)
        _marker(checkpoint).unlink()
        sync_entry(checkpoint.parent)
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(checkpoint.parent, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)


def checkpoint_to_resume(resume: str | bool, output_dir: str) -> str | None:
    """What `train(resume_from_checkpoint=resume)` goes on from in a run that keeps its rollouts on disk.

    All processes call it together and go on from the same step: the last one whose checkpoint all of them see.

    Args:
        resume (`str` or `bool`):
            A checkpoint's folder; or `True` for the last complete one, if there is any.
        output_dir (`str`):
            The trainer's.

    Raises:
        `ValueError`: on all processes, if `resume` is a checkpoint that was never written to its end, or if there are
            checkpoints but none that every process sees.
    """
    if resume is not True:
        blind = [rank for rank, complete in enumerate(gather_object([is_complete(resume)])) if not complete]
        if blind:
            raise ValueError(
                f"`resume_from_checkpoint={str(resume)!r}` is not a complete checkpoint{_seen_from(blind)}: the run "
                "was stopped while it was being written, or it is another folder. Pass `True` to go on from the last "
                "complete one."
            )
        damage = [find_damage(Path(resume)) if PartialState().is_local_main_process else None]
        for found in filter(None, gather_object(damage)):
            raise ValueError(f"{found}, so nothing can resume from it. Pass `True` for the last undamaged checkpoint.")
        return str(resume)
    # Whole files are read once on each machine
    last = last_checkpoint(output_dir) if PartialState().is_local_main_process else None
    complete = {folder for folder in Path(output_dir).glob("checkpoint-*") if is_complete(folder)}
    if PartialState().is_local_main_process:
        complete = {folder for folder in complete if last and _step(folder) <= _step(Path(last))}
    else:
        last = str(max(complete, key=_step)) if complete else None
    mine = {folder.name for folder in complete}
    views = gather_object([(os.path.abspath(output_dir), last, mine)])
    shared = set.intersection(*(names for _, _, names in views))
    if not shared and any(names for _, _, names in views):
        raise ValueError(_different_views(views))
    if not shared:
        logger.info("%s holds no complete checkpoint: training starts from the beginning.", output_dir)
        return None
    found = max((Path(output_dir, name) for name in shared), key=_step)
    if any(Path(other).name != found.name for _, other, _ in views):
        logger.warning("Training goes on from %s, the last checkpoint that all processes see.", found)
    return str(found)


def _seen_from(ranks: list[int]) -> str:
    return f" as process {', '.join(map(str, ranks))} sees it" if ranks != [0] else ""


def _different_views(views: list[tuple[str, str | None, set[str]]]) -> str:
    seen = [
        f"process {rank} finds {Path(last).name if last else 'none'} in {folder}"
        for rank, (folder, last, _) in enumerate(views)
    ]
    one = next(i for i, (_, last, _) in enumerate(views) if last)
    other = next(i for i, (_, _, names) in enumerate(views) if not names & views[one][2])
    return (
        f"`resume_from_checkpoint=True` finds no checkpoint that all processes see: {seen[one]}, but {seen[other]}, "
        "so they would train from different steps. Give all of them the same `output_dir`, on a disk that every "
        "machine shares; or copy the checkpoint to where it is missing; or start anew in an empty folder."
    )


def _marker(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.incomplete")


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
