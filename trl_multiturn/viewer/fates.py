"""What training made of each trajectory of a prompt, in a few words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..trajectory import Trajectory, Verdict


ROW, CUT = "row", "row, lost to max_length"
UNDER_WAY = "not selected yet"
# The names under which the selection counts them
ALL_WRONG, ALL_RIGHT = "unused: no_correct_one", "unused: no_incorrect_one"
IN_NO_PAIR, NOT_DRAWN = "unused: in_no_pair", "unused: not_drawn"
HELD_OUT = "held out"  # of an evaluation, on which nothing trains


def fates(
    group: Sequence[Trajectory], found: Collection[str] | None, trained: Collection[str] | None, paired: bool
) -> list[str]:
    """
    The fate of each trajectory of one prompt.

    Args:
        group (`Sequence[Trajectory]`):
            All of the prompt in an iteration; `info["dropped"]` says which filter dropped one.
        found (`Collection[str]`, *optional*):
            Ids of the trajectories in rows; `None` while the iteration rolls out.
        trained (`Collection[str]`, *optional*):
            Ids of those whose rows reached training; `None` where that is unknown.
        paired (`bool`):
            Whether rows are pairs, which need a correct and an incorrect side.

    Returns:
        `list[str]`: `"row"`, `"row, lost to max_length"`, `"dropped: …"` or `"unused: …"` with the name of the reason
        ([`Selection`]), `"not selected yet"`.
    """
    kept = {t.verdict for t in group if "dropped" not in t.info}

    def fate(trajectory: Trajectory) -> str:
        name = trajectory.info.get("trajectory_id")
        if found is None:
            return UNDER_WAY
        if name in found:
            return ROW if trained is None or name in trained else CUT
        if "dropped" in trajectory.info:
            return f"dropped: {trajectory.info['dropped']}"
        if not paired:
            return NOT_DRAWN
        if Verdict.CORRECT not in kept:
            return ALL_WRONG
        return IN_NO_PAIR if Verdict.INCORRECT in kept else ALL_RIGHT

    return [fate(trajectory) for trajectory in group]
