"""How a run that was stopped goes on: what an iteration does with what is on disk of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from ..distributed.main_process import on_main
from ..journal.run_folder import IterationFolder, RunFolder
from ..rollout.provenance import tools_without_patch
from .report import IterationReport, Samples
from .settings import IterationSettings


# What may change between two starts of a run. The rollouts stay; they are judged anew,
_JUDGING = {"reward_funcs", "reward_weights", "correct_threshold", "missing_reward"}
# selected and prepared anew,
_SELECTION = {"pairing", "reference", "history"}
# or those that are missing are added. (A prompt that is another one is refused by the journal, which knows each.)
_GROWING = {"prompts", "num_generations", "previous_policy_generations"}


@dataclass(frozen=True)
class Beginning:
    """How an iteration is about to begin.

    Attributes:
        iteration (`int`): 0-based.
        resumed_inside (`bool`): whether a part of its rows is trained on already.
        settings (`dict`): what decides which rows are found.
        policy_revision (`str`): hash of the policy that is to roll out.
        first_step (`int`): optimizer steps of the run so far.
        starting_revision (`str`, *optional*): hash of the policy that is to be trained; unknown as long as the
            iteration before trains.
    """

    iteration: int
    resumed_inside: bool
    settings: dict[str, Any]
    policy_revision: str
    first_step: int
    starting_revision: str | None = None

    def is_of(self, report: IterationReport) -> bool:
        """Whether a report is of this policy at this step."""
        return (report.policy_revision, report.first_step) == (self.policy_revision, self.first_step)

    def trains_from(self, report: IterationReport) -> bool:
        """Whether a report's rows were prepared for the policy that is to be trained, whose reference they carry."""
        known = report.starting_revision is not None and self.starting_revision is not None
        return not known or report.starting_revision == self.starting_revision


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
        changed = changed_settings(report.settings, beginning.settings)
        later = f" What changed ({', '.join(changed)}) counts from the next iteration on." if changed else ""
        return Plan("load", f"{name} goes on inside its epoch, with the rows in {folder.path}.{later}")
    if report is None:
        return Plan("roll out")
    changed = _refuse_other_rollouts(folder, report, beginning.settings)
    if beginning.is_of(report):
        if changed:
            names = ", ".join(f"`{name}`" for name in changed)
            return Plan(
                "roll out", f"{name} keeps the rollouts in {folder.path} and finds its rows anew: {names} changed."
            )
        if report.ready and beginning.trains_from(report):
            return Plan("load", f"{name} has its rows already: {folder.path}.")
        return Plan("roll out", f"{name} goes on with the rollouts in {folder.path}.")
    if beginning.first_step == 0:
        raise ValueError(
            f"{folder.path} was begun from another policy than the present one (revision {report.policy_revision} "
            f"before, {beginning.policy_revision} now), so its rollouts cannot go on. Use the earlier model, resume "
            f"from a checkpoint, or use another `output_dir`. Deleting {folder.path.parent} starts anew there and "
            "loses all iterations."
        )
    return Plan("set aside")


def set_aside_others(run: RunFolder, iteration: int, revision: str, first_step: int) -> None:
    """Sets aside what is on disk from an iteration on, unless this policy rolled it out at this step."""
    report = IterationReport.load(run.iteration(iteration).path)
    if report is not None and (report.policy_revision, report.first_step) != (revision, first_step):
        run.set_aside(iteration)


def write_beginning(
    beginning: Beginning, settings: IterationSettings, run: RunFolder
) -> tuple[IterationReport, Samples]:
    """Writes down that an iteration has begun, and with what; also returns which samples each policy draws."""
    folder = run.iteration(beginning.iteration)
    before = IterationReport.load(folder.path)
    samples = settings.samples(beginning.iteration, before.spans() if before else None)
    begun = IterationReport(
        beginning.iteration,
        beginning.first_step,
        policy_revision=beginning.policy_revision,
        settings=beginning.settings,
        ready=False,
        samples={policy: [[span.start, span.stop] for span in spans] for policy, spans in samples.items()},
        policy_lag=settings.lag(beginning.iteration),
    )
    on_main(lambda: begun.save(folder.path))
    return begun, samples


def step_layout(args: Any) -> dict[str, Any]:
    """What decides which rows of an iteration each optimizer step trains on.

    Batches may be spread over processes or accumulated: the rows of a step are the same.
    """
    names = ("seed", "data_seed", "group_by_prompt", "max_tokens_per_batch", "train_sampling_strategy")
    settings = {name: getattr(args, name, None) for name in names}
    return json.loads(
        json.dumps(
            {
                "per_device_train_batch_size": args.train_batch_size,
                "gradient_accumulation_steps * processes": args.gradient_accumulation_steps * args.world_size,
                **settings,
            },
            default=str,
        )
    )


def refuse_other_layout(report: IterationReport, now: dict[str, Any], global_step: int) -> None:
    """Raises where a run that goes on inside an iteration would train some rows twice and others not at all.

    Raises:
        `ValueError`: naming the argument.
    """
    before = report.step_layout or now  # a report of an earlier release does not say
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"The run stopped inside iteration {report.iteration + 1}, after {global_step - report.first_step} of its "
            f"steps, with `{name}` {before.get(name)!r}; now it is {now[name]!r}, so that some of its rows would be "
            "trained on twice and others never. Use the earlier value until the iteration ends (fewer processes can "
            "accumulate more), or resume from a checkpoint at the end of an iteration, or delete the checkpoints "
            f"after step {report.first_step} (the iteration trains from its beginning; its rollouts stay)."
        )


def found_otherwise(report: IterationReport, settings: dict[str, Any]) -> bool:
    """Whether an iteration's rows were judged or selected by other settings."""
    return bool(set(changed_settings(report.settings, settings)) & (_JUDGING | _SELECTION))


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the settings that are not what they were, in so far as that may change a row."""
    return [name for name in now if _comparable(name, before.get(name)) != _comparable(name, now[name])]


def _comparable(name: str, value: Any) -> Any:
    return tools_without_patch(value) if name == "tools" and isinstance(value, dict) else value


def _refuse_other_rollouts(folder: IterationFolder, report: IterationReport, settings: dict[str, Any]) -> list[str]:
    """The settings that changed, none of which decides how a trajectory comes out."""
    changed = changed_settings(report.settings, settings)
    decisive = [name for name in changed if name not in _JUDGING | _SELECTION | _GROWING]
    if decisive:
        name = decisive[0]
        count = report.trajectories or "all finished"
        raise ValueError(
            f"{folder.path} was begun with other settings (`{name}`: {_brief(report.settings.get(name))} before, "
            f"{_brief(settings[name])} now{', and others' if decisive[1:] else ''}), and rollouts of both must not be "
            f"mixed. Use the earlier settings, or delete {folder.path}, which loses {count} trajectories of iteration "
            f"{folder.number + 1}, or use another `output_dir`."
        )
    return changed


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:100] + "…"
