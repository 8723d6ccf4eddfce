"""Rows of similar length attend together in a step, and read no more padding than another call would cost."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
import torch

from tests.engines.test_transformers_engine import TOKENIZER, prompt, run_held
from tests.support import tiny_model
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.transformers import step_runs
from trl_multiturn.engines.transformers.engine import TransformersEngine
from trl_multiturn.engines.transformers.slot_attention import slot_attention
from trl_multiturn.engines.transformers.step_runs import CALL_COLUMNS, COLUMN_MULTIPLE, Run, in_runs, runs_of


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([5], [Run(0, 1, 32)]),
        ([200] * 32, [Run(0, 32, 224)]),
        ([32, 64, 32, 64], [Run(0, 4, 64)]),  # a call costs more than what two short rows read in vain
        ([100, 600, 610, 90, 80], [Run(0, 1, 128), Run(1, 3, 640), Run(3, 5, 96)]),
    ],
)
def test_rows_are_divided_where_padding_costs_more_than_a_call(lengths, runs):
    assert runs_of(lengths) == runs


def test_no_division_into_neighbours_is_cheaper():
    generator = random.Random(0)
    for _ in range(50):
        lengths = [generator.choice([30, 100, 400, 900]) for _ in range(generator.randint(1, 8))]
        runs = runs_of(lengths)
        assert [row for run in runs for row in range(run.first, run.last)] == list(range(len(lengths)))
        cuts = [cut for count in range(len(lengths)) for cut in combinations(range(1, len(lengths)), count)]
        divisions = [list(pairwise((0, *cut, len(lengths)))) for cut in cuts]
        assert _cost(lengths, [(run.first, run.last) for run in runs]) == min(_cost(lengths, d) for d in divisions)
        assert all(run.columns == _columns(lengths, run.first, run.last) for run in runs)


def _cost(lengths, division):
    return sum(CALL_COLUMNS + (last - first) * _columns(lengths, first, last) for first, last in division)


def _columns(lengths, first, last):
    return -(-max(lengths[first:last]) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


@pytest.mark.parametrize("heads", [2, 4], ids=["grouped", "each its own"])
def test_each_run_sees_what_it_would_see_among_all(heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(16, 4, 1, 8, generator=generator)
    key, value = torch.randn(2, 5, heads, 640, 8, generator=generator)
    lengths = [100, 600, 610, 90, 80]
    mask = torch.arange(640) < torch.tensor(lengths + [1] * 11)[:, None, None, None]
    layer = torch.nn.Module()
    layer.num_key_value_groups = 4 // heads
    together, _ = slot_attention(layer, query, key, value, mask, scaling=0.3)
    with in_runs(runs_of(lengths)):
        apart, _ = slot_attention(layer, query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=0)
    assert step_runs.step_runs() is None


def test_a_turn_is_the_same_to_the_last_bit_in_any_runs(monkeypatch):
    model = tiny_model(TOKENIZER, num_key_value_heads=1).eval()
    requests = [(prompt(n, seed=n), SamplingParams(8, seed=n)) for n in (3, 500, 40, 620, 90)]
    results = []
    for cost in (0, 160, 10**9):  # every row alone, as ever, all together
        monkeypatch.setattr(step_runs, "CALL_COLUMNS", cost)
        results.append(run_held(TransformersEngine(model, TOKENIZER), *requests))
    assert results == [results[0]] * 3
