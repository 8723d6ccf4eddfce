"""What plays an episode: the plain loop of turns, or something that decodes in another way."""

from __future__ import annotations

from typing import Any, Protocol

from ..trajectory import Trajectory
from .episode import Episode


class Player(Protocol):
    """Plays one trajectory, with as many toolboxes as it opens; it closes them.

    Attributes:
        provenance (`dict[str, Any]`): joins the provenance of the run; JSON values.
    """

    provenance: dict[str, Any]

    async def __call__(self, episode: Episode) -> Trajectory:
        """The trajectory of an episode; [`Episode`] has the steps of a conversation."""
        ...
