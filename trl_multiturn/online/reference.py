"""The reference of an iteration's rows: log-probabilities beside the rows, so that no second model is kept."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from datasets import Dataset

from ..data.truncation import NoRowsLeftError
from ..distributed.sharding import weights_of
from ..journal.run_folder import RunFolder
from ..trainer.loop.policy_weights import policy_weights


logger = logging.getLogger(__name__)


def with_reference(rows: Dataset, trainer: Any, reference: Literal["previous", "initial"], run: RunFolder) -> Dataset:
    """Prepares rows for the trainer and adds the reference's log-probabilities, so that no second model is kept.

    `"previous"`: the policy that has just rolled out (eq. 15), so every margin starts the iteration at 0 (to rounding,
    where a batch is padded to another length).
    `"initial"`: the policy before the first iteration (eq. 14), whose weights are put into the model for the moment.
    """
    if len(rows) == 0:
        return rows
    try:
        rows = trainer.prepare_rows(rows)
    except NoRowsLeftError as error:
        logger.warning("%s", error)
        return rows.select([])
    with reference_weights(trainer, reference, run):
        return trainer.compute_reference_columns(rows, reference="policy")


def restore_reference(trainer: Any, reference: Literal["previous", "initial"], run: RunFolder) -> None:
    """Gives a trainer that resumes before an iteration's first step the reference of the iteration's rows.

    Rows on disk carry its log-probabilities. A loss that reads whole distributions (OREO's KL) needs the reference
    itself, and the checkpoint of the iteration before holds the one before.
    """
    if getattr(trainer, "_needs_reference_distributions", False):
        with reference_weights(trainer, reference, run):
            trainer.refresh_reference()


def reference_weights(
    trainer: Any, reference: Literal["previous", "initial"], run: RunFolder
) -> AbstractContextManager[None]:
    """Runs the body with the reference's weights in the policy: its present ones, or the initial ones."""
    if reference == "previous":
        return nullcontext()
    return policy_weights(weights_of(trainer), run.iteration(0).policy)
