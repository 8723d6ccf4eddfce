"""Padding rows of a step attend to nothing, and no trajectory notices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.engines.test_transformers_engine import TOKENIZER, build, prompt, run
from tests.support import tiny_model
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.transformers import slot_attention, step_runs
from trl_multiturn.engines.transformers.engine import EngineError, TransformersEngine
from trl_multiturn.engines.transformers.slot_attention import SLOT_ATTENTION, attention_for_sampling


def record_rows(monkeypatch) -> list[tuple[int, int]]:
    """Rows of the queries and of the keys in each call of attention with one query per row."""
    rows, attention = [], slot_attention._attention

    def recorded(module, query, key, value, attention_mask, **kwargs):
        if query.shape[2] == 1:
            rows.append((len(query), len(key)))
        return attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(slot_attention, "_attention", recorded)
    monkeypatch.setattr(step_runs, "CALL_COLUMNS", 10**9)  # one call a step
    return rows


@pytest.mark.parametrize("groups", [1, 2])
def test_the_first_rows_attend_as_ever_and_the_others_not_at_all(groups):
    layer = nn.Module()
    layer.num_key_value_groups = groups
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(16, 4, 1, 8, generator=generator)
    key, value = torch.randn(2, 16, 4 // groups, 32, 8, generator=generator)
    mask = torch.arange(32) <= torch.arange(5, 21)[:, None, None, None]
    expected, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    for live in (1, 5, 16):
        output, _ = slot_attention.slot_attention(layer, query, key[:live], value[:live], mask, scaling=0.3)
        assert output.shape == (16, 1, 4, 8)
        torch.testing.assert_close(output[:live], expected[:live], atol=1e-6 if groups > 1 else 0, rtol=0)
        assert not output[live:].any()


def test_the_heads_of_a_group_share_their_keys_without_a_copy(monkeypatch):
    masks = []

    def recorded(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(slot_attention, "sdpa_attention_forward", recorded)  # which copies them where there is a mask
    model = build("qwen2-grouped-queries").eval()
    engine = TransformersEngine(model, TOKENIZER)
    assert len(run(engine, (prompt(20, seed=1), SamplingParams(3, seed=1)))[0].token_ids) == 3
    assert masks and all(mask is None for mask in masks)  # of the self-test's plain pass


@pytest.mark.parametrize("name", ["qwen2", "qwen2-grouped-queries", "qwen2-mixed-windows", "gpt2-learned-positions"])
def test_a_trajectory_is_the_same_to_the_last_bit_among_any_number_of_rows(name, monkeypatch):
    model = build(name).eval()
    request = (prompt(37, seed=3), SamplingParams(12, temperature=1.2, top_p=0.9, seed=5))
    others = [(prompt(3 + 2 * n, seed=n), SamplingParams(12, seed=n)) for n in range(16)]
    seen, results = record_rows(monkeypatch), []
    for live in (1, 5, 16, 17):
        engine = TransformersEngine(model, TOKENIZER, max_batch_size=live)
        run(engine, request)  # the self-test's calls are over
        seen.clear()
        results.append(run(engine, *others[: live - 1], request)[-1])
        assert (live, live) in seen and max(queries for queries, _ in seen) == live
    assert results == [results[0]] * 4


def test_so_it_is_beside_conversations_that_are_much_longer():
    """Attention works through the keys in blocks: those of the longest row must not change what a short one sees."""
    model = tiny_model(TOKENIZER, hidden_size=32, num_key_value_heads=1).eval()
    request = (prompt(500, seed=3), SamplingParams(30, seed=5))  # passes 512 keys on its way
    results = []
    for live in (1, 5, 17):
        engine = TransformersEngine(model, TOKENIZER)
        others = [(prompt(150 * n % 1400 + 1, seed=n), SamplingParams(40, seed=n)) for n in range(1, live)]
        results.append(run(engine, *others, request)[-1])
    assert results == [results[0]] * 3


def test_rows_and_columns_of_a_step(monkeypatch):
    """The queries are padded to the kernels' tile, the keys are not: attention gets the live rows of both."""
    model = tiny_model(TOKENIZER).eval()
    engine = TransformersEngine(model, TOKENIZER)
    hidden = set()
    model.model.layers[0].register_forward_hook(lambda module, args, out: hidden.add(tuple(args[0].shape[:2])))
    seen = record_rows(monkeypatch)
    run(engine, *((prompt(1, seed=n), SamplingParams(4, seed=n)) for n in range(3)))
    assert {rows for rows, length in hidden if length == 1} == {16}
    assert (3, 3) in seen and (16, 16) not in seen


def test_the_models_attention_comes_back_even_after_an_error():
    model = tiny_model(TOKENIZER)
    seen = set()
    hook = model.register_forward_pre_hook(lambda module, _: seen.add(module.config._attn_implementation))
    run(TransformersEngine(model, TOKENIZER), (prompt(4), SamplingParams(2)))
    assert (seen, model.config._attn_implementation) == ({SLOT_ATTENTION}, "sdpa")
    hook.remove()
    model.lm_head.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("broken")))
    with pytest.raises(EngineError, match="broken"):
        run(TransformersEngine(model, TOKENIZER), (prompt(4), SamplingParams(2)))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kept", ["eager", "sdpa"])
def test_a_model_that_cannot_be_told_reads_all_rows(kept, monkeypatch):
    requests = [(prompt(9 + n, seed=n), SamplingParams(6, seed=n)) for n in range(3)]
    model = tiny_model(TOKENIZER).eval()
    expected = run(TransformersEngine(model, TOKENIZER), *requests)
    if kept == "eager":
        model.set_attn_implementation("eager")
    else:  # as code is whose attention does not ask transformers which implementation to run
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with attention_for_sampling(model):
        assert model.config._attn_implementation == kept
    found = run(TransformersEngine(model, TOKENIZER), *requests)
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-5, rtol=1e-5)
