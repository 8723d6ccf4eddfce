"""What training made of each trajectory of a prompt, in a few words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..trajectory import Trajectory, Verdict


ROW, CUT = "row", "row, lost to max_length"
UNDER_WAY = "not selected yet"
ALL_WRONG, ALL_RIGHT = "unpaired: no correct one", "unpaired: no incorrect one"
LEFT_OVER = "left over"


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
        `list[str]`: `"row"`, `"row, lost to max_length"`, `"dropped: …"`, `"unpaired: …"`, `"left over"` (others were
        enough, or it met no partner), `"not selected yet"`.
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
        if paired and Verdict.CORRECT not in kept:
            return ALL_WRONG
        if paired and Verdict.INCORRECT not in kept:
            return ALL_RIGHT
        return LEFT_OVER

    return [fate(trajectory) for trajectory in group]
