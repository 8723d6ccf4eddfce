"""Verdicts to rows: which trajectories are trained on, in which pairs, and their files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from .pairing import (
        build_preference_dataset as build_preference_dataset,
        build_unpaired_dataset as build_unpaired_dataset,
    )
    from .row_files import save_rows as save_rows, write_rows as write_rows
    from .selection import (
        PairingConfig as PairingConfig,
        Selection as Selection,
        UnpairedConfig as UnpairedConfig,
        select as select,
        select_by_prompt as select_by_prompt,
    )
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".pairing": ["build_preference_dataset", "build_unpaired_dataset"],
            ".row_files": ["save_rows", "write_rows"],
            ".selection": ["PairingConfig", "Selection", "UnpairedConfig", "select", "select_by_prompt"],
        },
    )
