"""
Which models may be packed: what rules one out, and a self-test on the very model that is to be trained.

The list of what is refused is short and by property, never by model name. What remains is tried: two trajectories that
fork must score the same packed as padded, and every attention layer must have asked for the window its config states.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..precision import matmul_uses_tf32
from .decoder import PackedDecoder, without_adapters
from .forward import PackedForward
from .fused.trial import reason_against_fusing
from .row import PackedRow


_PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
_PACKABLE_ATTENTION = {"sdpa", "eager", "flash_attention_2", "flash_attention_3", "packed_sdpa", "packed_eager"}

_FORK, _LENGTH = 12, 21


def reason_against_hooks(model: nn.Module) -> str | None:
    """Why not even the scored head can be used with this model, or `None`."""
    if getattr(model, "is_deepspeed_managed", False) or any(hasattr(p, "ds_id") for p in model.parameters()):
        return "DeepSpeed shards or schedules the parameters that the packed path reads"
    peft_configs = getattr(model, "peft_config", None) or {}
    if any(getattr(config, "is_prompt_learning", False) for config in peft_configs.values()):
        return "prompt-learning PEFT puts virtual tokens into the sequences"
    causal_lm = without_adapters(model)
    if causal_lm.config.get_text_config() is not causal_lm.config:
        return "the model is multimodal"
    if causal_lm.base_model is causal_lm:
        return "the model has no separate backbone"
    return None


def reason_against_packing(model: nn.Module) -> str | None:
    """What rules packing out before anything is run, or `None`."""
    causal_lm = without_adapters(model)
    config = causal_lm.config.get_text_config()
    unpackable = sorted(set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS)
    if unpackable:
        return f"layers of type {', '.join(unpackable)} cannot branch"
    if config._attn_implementation not in _PACKABLE_ATTENTION:
        return f"attention runs on `{config._attn_implementation}`; load it with `attn_implementation='sdpa'`"
    if not getattr(causal_lm, "_supports_attention_backend", False):
        return "the architecture does not take attention functions from transformers' AttentionInterface"
    if len(set((getattr(causal_lm, "hf_device_map", None) or {}).values())) > 1:
        return "the model is split across devices"
    if getattr(config, "attention_dropout", 0.0):
        return "`attention_dropout` is set, and a token shared by several trajectories would drop for all at once"
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return "dropout is on, and a token shared by several trajectories would drop for all at once"
    return None


def try_fused_layers(forward: PackedForward) -> None:
    """
    Compares a fused layer with its class, forward and backward, and takes the fused layers off where they differ. To
    be called in the precision that the model is trained in.
    """
    if forward.fused:
        batch = _forked_batch(forward.causal_lm.config.get_text_config().vocab_size, forward.fused[0].device)
        forward.reason_against_fusing = reason_against_fusing(forward.backbone, forward.fused, batch["input_ids"])
        if forward.reason_against_fusing is not None:
            forward.unfuse()


def self_test(forward: PackedForward) -> str | None:
    """
    Score two trajectories that fork, padded and then packed; why the results differ, or `None` where they agree.

    The padded pass runs on the attention the model came with. The model is left as it was: weights are only read, and
    PyTorch's random state is not touched. Where only fused layers differ, they are taken off.
    """
    reason = _scores_differ(forward)
    if reason is None or not forward.fused:
        return reason
    forward.unfuse()
    forward.reason_against_fusing = reason
    return _scores_differ(forward)


def _scores_differ(forward: PackedForward) -> str | None:
    """Why packed scores of two trajectories differ from padded ones, or `None`."""
    model, config = forward.model, forward.causal_lm.config.get_text_config()
    batch = _forked_batch(config.vocab_size, next(forward.backbone.parameters()).device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    always, forward._pack = forward._pack, True
    try:
        with torch.no_grad():
            with forward.as_it_came():
                padded = model(**batch, fused_lm_head=True).log_probs
            plan = forward.plan({**batch, "fused_lm_head": True})
            assert plan is not None and plan.row is not None  # it packs always here
            row = plan.row
            packed = model(**batch, fused_lm_head=True).log_probs
        eps = _precision(row, forward.causal_lm)
    except Exception as error:  # of whatever kind: the model is not ours, and the run can do without packing
        return f"the self-test raised {type(error).__name__}: {error}"
    finally:
        forward._pack = always
        for module in training:
            module.training = True
        forward.plans.clear()
        forward.calls.update(packed=0, padded=0)
    return _disagreement(padded, packed, eps) or _missing_windows(row.windows_seen, config)


def decoder_self_test(packed: PackedDecoder) -> str | None:
    """
    As [`self_test`], for a decoder without an LM head: the hidden states of two trajectories that fork.

    The decoder runs in evaluation mode on its packed path's attention, padded and then packed.
    """
    model = packed.decoder
    batch = _forked_batch(model.config.get_text_config().vocab_size, next(model.parameters()).device)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    training = [module for module in model.modules() if module.training]
    model.eval()
    pack = packed._pack
    try:
        states = []
        with torch.no_grad():
            for packed._pack in (False, True):
                states.append(model(**inputs).last_hidden_state[batch["attention_mask"].bool()])
    except Exception as error:  # of whatever kind: the model is not ours, and the run can do without packing
        return f"the self-test raised {type(error).__name__}: {error}"
    finally:
        packed._pack = pack
        for module in training:
            module.training = True
        packed._plans.clear()
        packed.calls.update(packed=0, padded=0)
    scale = states[0].float().square().mean().sqrt().clamp(min=1e-6)
    eps = torch.finfo(model.dtype).eps
    difference = (states[0].float() - states[1].float()).abs() / scale
    if difference.max() <= max(1e-3, 64 * eps) and difference.mean() <= max(1e-3, 16 * eps):
        return None
    return f"packed hidden states differ from padded ones by {difference.max():.2g} in the self-test"


def _forked_batch(vocab_size: int, device: torch.device) -> dict[str, Tensor]:
    """Two trajectories with `_FORK` common tokens, one of them padded; ids spread over the vocabulary."""
    ids = (torch.arange(2 * _LENGTH).view(2, _LENGTH) * 7919 + 13) % vocab_size
    ids[1, :_FORK] = ids[0, :_FORK]
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    return {name: x.to(device) for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def _precision(row: PackedRow, model: PreTrainedModel) -> float:
    """Relative rounding error of the pass: the weights', or that of attention, which autocast makes coarser."""
    eps = max(torch.finfo(dtype).eps for dtype in {model.dtype, *row.dtypes_seen})
    return max(eps, 2.0**-10) if row.input_ids.is_cuda and matmul_uses_tf32() else eps


def _disagreement(padded: Tensor, packed: Tensor, eps: float) -> str | None:
    """Rounding may put a single token far off, but not all of them; a wrong path does."""
    difference = (padded.float() - packed.float()).abs()
    largest, mean = difference.max().item(), difference[difference > 0].mean().nan_to_num().item()
    if largest <= max(1e-3, 32 * eps) and mean <= max(1e-3, 16 * eps):
        return None
    return (
        f"packed log-probabilities differ from padded ones by {largest:.2g} ({mean:.2g} on average) in the self-test"
    )


def _missing_windows(seen: list[int | None], config: PreTrainedConfig) -> str | None:
    """The test is shorter than most windows, so what each layer asked for is compared with what the config states."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if types is not None:
        expected = [window if kind == "sliding_attention" else None for kind in types]
    else:
        expected = [window] * config.num_hidden_layers
    if seen == expected:
        return None
    return f"layers asked for windows {seen}, but the config states {expected}"
