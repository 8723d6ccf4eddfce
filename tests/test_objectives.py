"""The table of `docs/objectives.md` on agents of two turns, at three seeds: which objectives reach the optimum."""

from __future__ import annotations

import pytest

from benchmarks.objectives import OBJECTIVES, figure, measure, table


pytestmark = pytest.mark.slow

# Distances of all seeds with certain and with uncertain tools lie between; measured: below 1.5e-3, 3e-3 to 0.014, and
# 0.038 to 0.75
REACHED, NEAR, MISSED = (0.0, 2.5e-3), (2.5e-3, 0.03), (0.03, 1.0)
EXPECTED = {
    "M-DPO": (REACHED, MISSED),
    "M-DPO with the observation margin": (REACHED, REACHED),
    "M-KTO": (MISSED, MISSED),
    "OREO, tokens": (REACHED, REACHED),
    "OREO, turns": (REACHED, REACHED),
    "OREO, response": (REACHED, MISSED),
    "DQO, λ = 1": (REACHED, REACHED),
    "DQO, λ = 0.95": (REACHED, REACHED),
    "OREO, values by classification": (REACHED, NEAR),
    "DQO, values by classification": (REACHED, NEAR),
    "DRO": (REACHED, MISSED),
    "AGRO": (REACHED, MISSED),
    "AGRO with the margin": (REACHED, REACHED),
    "A*-PO, OAPL": (REACHED, MISSED),
    "A*-PO, OAPL with the margin": (REACHED, REACHED),
    "group mean": (MISSED, MISSED),
    "REFUEL, soft returns": (REACHED, REACHED),
    "TBRM": (REACHED, MISSED),
    "DMPO's weights": (MISSED, MISSED),
}


@pytest.fixture(scope="module")
def results():
    return measure(turns=2, steps=240)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_an_objective_converges_to(results, name):
    for distances, expected in zip(results[name], EXPECTED[name], strict=True):
        assert len(distances) == 3
        assert expected[0] <= min(distances) and max(distances) < expected[1]


def test_every_objective_is_in_the_table_and_in_the_figure(results):
    assert list(EXPECTED) == [objective.name for objective in OBJECTIVES]
    assert table(results).count("\n") == len(EXPECTED) + 1
    assert figure(results).count("<rect") == 3 + 2 * len(EXPECTED)
