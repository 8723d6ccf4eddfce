"""Tiny random models of every architecture the packed path is proven on, and batches of branching trajectories."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor


VOCAB = 97

_COMMON = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, router_aux_loss_coef=0.01)

# name -> (config class, model class, settings); windows are shorter than the sequences
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", dict(tie_word_embeddings=True)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2_mixed_windows": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=2),
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=8)),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=9)),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8)),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=8, _sliding_window_pattern=2),
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(head_dim=8, **_EXPERTS)),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.01, sliding_window=None),
    ),
}


def tiny(family: str, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A tiny model of a family, in evaluation mode."""
    config_name, model_name, settings = FAMILIES[family]
    config = getattr(transformers, config_name)(**{**_COMMON, **settings, **overrides})
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(config).eval()


def branching_batch(seed: int = 0, width: int = 40) -> dict[str, Tensor]:
    """
    Nine right-padded trajectories of two prompts: forks at several depths, an exact duplicate, a strict prefix of
    another row, and a row that shares nothing; every second token or so is scored.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=generator).tolist()

    prompt, other = tokens(11), tokens(14)
    turn = prompt + tokens(9)
    rows = [
        turn + tokens(12),
        turn + tokens(5),
        turn + tokens(20),
        prompt + tokens(17),
        other + tokens(10),
        other + tokens(21),
        tokens(8),
    ]
    rows += [list(rows[1]), rows[5][:20]]
    return batch_of(rows, generator, width)


def batch_of(rows: list[list[int]], generator: torch.Generator, width: int) -> dict[str, Tensor]:
    """Rows as TRL's collators make them: padded right, labels -100 where a token is not scored."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    scored = mask.bool() & (torch.rand(ids.shape, generator=generator) < 0.5)
    scored[:, 0] = False
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~scored, -100)}
