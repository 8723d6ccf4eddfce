"""How a strategy of the user's own takes the place of one of ours, and what its choice is checked for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .._lazy import load_path
from ..trajectory import Trajectory


Strategy = Callable[..., Any]
"""Chooses among the trajectories of one prompt: `(trajectories, config, rng) -> list[Pair]` for pairs, `-> list` of
trajectories for unpaired rows. The trajectories are judged, filtered and in an order that does not depend on their
arrival; `rng` is a [`random.Random`] that depends on the seed and the prompt alone."""


def resolve_strategy(strategy: Strategy | str | None, known: Mapping[str, Strategy]) -> Strategy:
    """The function that `strategy` stands for: one of `known` by name, one by its dotted path, or the function.

    Raises:
        `TypeError`: if it cannot be called with three arguments.
        `ValueError`: if a name is unknown, or a path leads nowhere.
    """
    choices = f"{', '.join(map(repr, known))}, a function, or its dotted path (`'my_package.my_strategy'`)"
    found: Any = strategy
    if isinstance(strategy, str):
        if strategy in known:
            return known[strategy]
        try:
            found = load_path(strategy)
        except ValueError as error:
            why = f"could not be loaded ({error})" if "." in strategy else "is unknown"
            raise ValueError(f"`strategy={strategy!r}` {why}. Use one of {choices}.") from error
    try:
        inspect.signature(found).bind(None, None, None)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`strategy={strategy!r}` cannot be called as `strategy(trajectories, config, rng)` ({error}). Pass one "
            f"of {choices}."
        ) from None
    return found


def check_choice(strategy: Any, chosen: Iterable[Trajectory], group: Sequence[Trajectory]) -> None:
    """Refuses trajectories that a strategy was not given, and such as it chose twice.

    Raises:
        `ValueError`: saying which.
    """
    left = {id(trajectory) for trajectory in group}
    for trajectory in chosen:
        if id(trajectory) not in left:
            known = any(trajectory is each for each in group)
            what = "chose a trajectory twice" if known else "returned a trajectory that it was not given"
            raise ValueError(
                f"`strategy={strategy!r}` {what} (prompt {trajectory.info.get('prompt_index', '?')}). Choose each of "
                "the trajectories that it is given once at most."
            )
        left.remove(id(trajectory))
