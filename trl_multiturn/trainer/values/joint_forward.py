"""
Policy and value model as one module: one wrapped call computes everything that a value-based loss needs.

DDP, FSDP and DeepSpeed want all trained parameters under one module and inside one forward pass; checkpoints and
generation want a policy and nothing else. [`attach_value_model`] gives both.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ...losses import LMHead, full_vocab_kl
from ...models.value_model import ValueModel, decoder
from ...packing.decoder import capture_hidden_states
from ...packing.expanded import expanded_arguments, gather_output, states_of
from ...packing.forward import packed_forward_of
from ...packing.sequences import sequences_of


_ATTRIBUTE = "value_model"  # the name under which a policy holds its value model

# What only a language-modelling head, or the call of one, reads
_OF_THE_HEAD = ("labels", "use_cache", "output_router_logits")


@dataclass
class PolicyValueOutput(ModelOutput):
    """
    What a policy with an attached value model returns for `values=True`. Columns `t = 0 … L−2` score token `t + 1`.

    Args:
        log_probs (`Tensor`): `(B, L−1)`, log-probabilities of the labels, 0 where the label is −100.
        entropy (`Tensor`): `(B, L−1)`, detached.
        state_values (`Tensor`): `(B, L−1)`, `V` of the state in which the token of column `t` was chosen; log-odds of
            the reward 1 from a value model that learns by classification.
        kl (`Tensor`, *optional*): `(B, L−1)`, exact KL to the reference, 0 where the label is −100.
        aux_loss (`Tensor`, *optional*): load-balancing loss of a mixture of experts.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    state_values: Tensor | None = None  # not `values`: a `ModelOutput` is a dictionary, and DDP iterates over it
    kl: Tensor | None = None
    aux_loss: Tensor | None = None


def attach_value_model(policy: PreTrainedModel | PeftModel, value_model: ValueModel) -> None:
    """
    Make `value_model` a part of `policy`, to be called before a distributed backend wraps the policy.

    The pair is then one module: DDP, FSDP and DeepSpeed see all trained parameters, an optimizer can have a group for
    each, and `policy(input_ids=…, attention_mask=…, labels=…, values=True)` computes everything that a value-based
    loss needs in one wrapped call and returns a [`PolicyValueOutput`]. Without `values=True` the call is the policy's
    own, `generate` included, and `state_dict()`, `load_state_dict()` and `save_pretrained()` are those of the policy.

    The policy must carry TRL's fused head (`add_fused_lm_head`).
    """
    setattr(policy, _ATTRIBUTE, value_model)
    original_forward = policy.forward

    def forward(
        self,
        *args,
        values: bool = False,
        ref_hidden: Tensor | None = None,
        ref_head=None,
        kl_chunk_size=1024,
        **kwargs,
    ):
        if not values:
            return original_forward(*args, **kwargs)
        labels = kwargs["labels"][:, 1:]
        columns = labels.size(1)
        with capture_hidden_states(decoder(self)) as captured:
            if packed_forward_of(self) is None:
                outputs = _unpacked(self, original_forward, *args, **kwargs, fused_lm_head=True)
            else:
                # Packed rows are computed by hooks on the module's call, which a call of its forward would pass by
                with _forward_of(self, original_forward):
                    outputs = self(*args, **kwargs, fused_lm_head=True)
        hidden = captured[0][:, -columns - 1 :]  # prompt-learning adapters prepend positions
        critic = getattr(self, _ATTRIBUTE)
        if critic.kind == "head":
            state_values = critic(hidden_states=hidden, raw=True)
        else:
            others = {name: value for name, value in kwargs.items() if name not in _OF_THE_HEAD}
            state_values = critic(**others, raw=True)
        kl = None
        if ref_hidden is not None:
            mask = labels != -100
            scored = full_vocab_kl(
                hidden[:, :-1][mask], lm_head(self), ref_hidden[:, :-1][mask], ref_head, kl_chunk_size
            )
            kl = scored.new_zeros(mask.shape).masked_scatter(mask, scored)
        return PolicyValueOutput(
            log_probs=outputs.log_probs[:, -columns:],
            entropy=outputs.entropy[:, -columns:].detach(),
            state_values=state_values[:, :-1],
            kl=kl,
            aux_loss=outputs.aux_loss,
        )

    vars(policy)["forward"] = types.MethodType(forward, policy)
    policy.register_state_dict_post_hook(_drop_value_model)
    policy.register_load_state_dict_post_hook(_ignore_missing_value_model)


def _unpacked(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A module's forward pass on a padded batch: on its segments, where its rows branch."""
    sequences = sequences_of(kwargs["input_ids"])
    if sequences is None:
        return forward(*args, **kwargs)
    with states_of(sequences, module):
        return gather_output(sequences, forward(*args, **expanded_arguments(sequences, kwargs)))


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """
    A module whose calls run `forward`, for as long as its own is running.

    What Accelerate wraps around a module's forward is entered already, and its autocast must not be entered twice:
    `torch.autocast` keeps one previous state per instance, so it would stay on for good.
    """
    running = vars(module)["forward"]
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        vars(module)["forward"] = running


def lm_head(model: Any) -> LMHead:
    """The [`LMHead`] of a causal language model, with what its architecture does to the logits after the product."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    config = model.config.get_text_config()
    # Names and meanings as in the architectures' own forward passes
    scale = 1.0
    for name, invert in (
        ("logit_scale", False),
        ("output_multiplier", False),
        ("lm_head_multiplier", False),
        ("logits_scaling", config.model_type != "hyperclovax"),
    ):
        factor = getattr(config, name, None)
        if factor is not None:
            scale = 1 / factor if invert else factor
            break
    output = model.get_output_embeddings()
    bias = None if output.bias is None else _gathered(output.bias)
    return LMHead(_gathered(output.weight), bias, scale, getattr(config, "final_logit_softcapping", None))


def _gathered(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _drop_value_model(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for key in [key for key in state_dict if key.startswith(f"{prefix}{_ATTRIBUTE}.")]:
        del state_dict[key]


def _ignore_missing_value_model(module: nn.Module, incompatible_keys: Any) -> None:
    kept = [key for key in incompatible_keys.missing_keys if f"{_ATTRIBUTE}." not in key]
    incompatible_keys.missing_keys[:] = kept
