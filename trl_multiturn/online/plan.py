"""How a run that was stopped goes on: what an iteration does with what is on disk of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from ..journal.run_folder import IterationFolder
from .report import IterationReport


@dataclass(frozen=True)
class Beginning:
    """How an iteration is about to begin.

    Attributes:
        iteration (`int`): 0-based.
        resumed_inside (`bool`): whether a part of its rows is trained on already.
        settings (`dict`): what decides which rows are found.
        policy_revision (`str`): hash of the policy that is to roll out.
        first_step (`int`): optimizer steps of the run so far.
    """

    iteration: int
    resumed_inside: bool
    settings: dict[str, Any]
    policy_revision: str
    first_step: int

    def is_of(self, report: IterationReport) -> bool:
        """Whether a report is of this policy at this step."""
        return (report.policy_revision, report.first_step) == (self.policy_revision, self.first_step)


@dataclass(frozen=True)
class Plan:
    """What to do with what is on disk of an iteration, and what to tell of it."""

    action: Literal["roll out", "load", "set aside"]
    notice: str | None = None


def plan_iteration(folder: IterationFolder, beginning: Beginning) -> Plan:
    """Decides from an iteration's report how it goes on.

    Raises:
        `ValueError`: if it cannot; nothing was overwritten.
    """
    report, name = IterationReport.load(folder.path), f"Iteration {beginning.iteration + 1}"
    if beginning.resumed_inside:
        if report is None or not report.ready:
            raise ValueError(
                f"The checkpoint lies inside iteration {beginning.iteration + 1}, but {folder.path} does not hold its "
                "rows. Restore the folder, or resume from a checkpoint at the end of an iteration."
            )
        return Plan("load", f"{name} goes on inside its epoch, with the rows in {folder.path}.")
    if report is None:
        return Plan("roll out")
    _refuse_other_settings(folder, report, beginning.settings)
    if beginning.is_of(report):
        if report.ready:
            return Plan("load", f"{name} has its rows already: {folder.path}.")
        return Plan("roll out", f"{name} goes on with the rollouts in {folder.path}.")
    if beginning.first_step == 0:
        raise ValueError(
            f"{folder.path} was begun from another policy than the present one (revision {report.policy_revision} "
            f"before, {beginning.policy_revision} now), so its rollouts cannot go on. Use the earlier model, resume "
            "from a checkpoint, or use another `output_dir`."
        )
    return Plan("set aside")


def _refuse_other_settings(folder: IterationFolder, report: IterationReport, settings: dict[str, Any]) -> None:
    changed = [name for name in settings if settings[name] != report.settings.get(name)]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{folder.path} was begun with other settings (`{name}`: {_brief(report.settings.get(name))} before, "
            f"{_brief(settings[name])} now{', and others' if changed[1:] else ''}), and rows of both must not be "
            "mixed. Use the earlier settings, or another `output_dir`."
        )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "…"
