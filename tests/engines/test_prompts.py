"""On a CPU prompts are read one behind the other: no padding, nothing behind the last layer's keys and values."""

from __future__ import annotations

import pytest
import torch

from tests.engines.test_transformers_engine import ARCHITECTURES, TOKENIZER, build, prompt, run, run_held, score
from tests.support import tiny_model
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.transformers.engine import TransformersEngine
from trl_multiturn.engines.transformers.packed_prompts import Piece
from trl_multiturn.engines.transformers.prompts import _packed, _rectangles


def passes_of(model) -> list[tuple[int, int]]:
    """Rows and tokens of each pass over prompts, as the first layer's attention sees them."""
    shapes: list[tuple[int, int]] = []
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))[0]
    layer.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    return shapes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_whose_attention_can_be_told_is_read_so(name):
    model = build(name).eval()
    engine = TransformersEngine(model, TOKENIZER)
    ids = prompt(40)  # longer than the windows
    run(engine, (ids, SamplingParams(2, temperature=0)))
    shapes = passes_of(model)
    (generation,) = run(engine, (ids, SamplingParams(4, temperature=0)))
    assert (1, 39 if name != "gemma2-eager" else 48) in shapes
    assert generation.token_ids == score(model, ids, generation.token_ids)[1]


def test_prompts_of_any_length_share_a_pass_without_padding():
    model = tiny_model(TOKENIZER).eval()
    engine = TransformersEngine(model, TOKENIZER)
    run(engine, (prompt(3), SamplingParams(1)))
    shapes = passes_of(model)
    lengths = (30, 7, 21, 55)
    run_held(engine, *((prompt(n, seed=n), SamplingParams(1)) for n in lengths))
    read = [tokens for _, tokens in shapes if tokens > 1]
    assert sum(read) == 29 + 6 + 20 + 54
    assert len(read) <= 2  # the first may be taken before the others are there


def test_nothing_is_computed_behind_the_last_layers_keys_and_values():
    model = tiny_model(TOKENIZER).eval()
    engine = TransformersEngine(model, TOKENIZER)
    run(engine, (prompt(3), SamplingParams(1)))
    rows = []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    run(engine, (prompt(50), SamplingParams(2)))
    assert rows == [16] * 4  # two steps


def test_a_prompt_read_in_parts_is_read_in_the_same_parts_among_any_others():
    model = tiny_model(TOKENIZER).eval()
    request = (prompt(150, seed=1), SamplingParams(6, seed=1))
    alone = run(TransformersEngine(model, TOKENIZER, max_prefill_tokens=64), request)[0]
    others = [(prompt(20 + n, seed=n), SamplingParams(6, seed=n)) for n in range(8)]
    crowd = run_held(TransformersEngine(model, TOKENIZER, max_prefill_tokens=64), *others, request)
    assert crowd[-1] == alone


def test_passes_hold_what_fits():
    pieces = [Piece(row, 2, list(range(length))) for row, length in enumerate((0, 3, 4, 5, 5, 14))]
    parts = [[(part.row, part.start, len(part.token_ids)) for part in together] for together in _packed(pieces, 9)]
    assert parts == [[(1, 2, 3), (2, 2, 4)], [(3, 2, 5)], [(4, 2, 5)], [(5, 2, 9)], [(5, 11, 5)]]
    widths = [[len(piece.token_ids) for piece in together] for together in _rectangles(pieces, 48)]
    assert widths == [[0, 3, 4], [5, 5, 14]]


@pytest.mark.parametrize("change", ["a bias of the scores", "hooks that move weights"])
def test_what_cannot_be_read_so_is_read_in_rectangles(change, monkeypatch):
    model = tiny_model(TOKENIZER).eval()
    if change == "hooks that move weights":
        model.model._hf_hook = None  # as Accelerate marks them
    else:
        attention = "trl_multiturn.engines.transformers.packed_prompts.PackedAttention.__call__"

        def refused(*args, **kwargs):
            raise ValueError("A bias of the scores cannot be cut into pieces.")

        monkeypatch.setattr(attention, refused)
    engine = TransformersEngine(model, TOKENIZER)
    run(engine, (prompt(3), SamplingParams(1)))
    shapes = passes_of(model)
    (generation,) = run(engine, (prompt(20), SamplingParams(5, temperature=0)))
    assert (1, 32) in shapes
    assert generation.token_ids == score(model, prompt(20), generation.token_ids)[1]
