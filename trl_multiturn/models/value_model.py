"""
The value model: what OREO and DQO train beside the policy, and what searches ask for the value of a state.

A value model is a decoder's last hidden states times one vector, without bias or activation, zero at the start. Three
kinds differ in where the hidden states come from:

- `"full"`: a second model, started from the policy's weights (OREO at 1.5B).
- `"adapter"`: LoRA layers over a frozen base whose weights are *shared* with the policy (below a LoRA policy) or with
  the reference model: one backbone in memory (OREO at 7B).
- `"head"`: the policy's own hidden states, detached; the vector alone is trained.

Saved beside a policy in a folder of its own, it loads with one call, [`ValueModel.from_pretrained`].
"""

from __future__ import annotations

import copy
import json
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from ..images.vision import refuse_missing_images


ValueModelKind = Literal["adapter", "full", "head"]
ValueObjective = Literal["regression", "classification"]
VALUE_OBJECTIVES: tuple[ValueObjective, ...] = ("regression", "classification")

_ADAPTER = "value"  # not "default": the policy's own adapter has that name
_CONFIG_FILE, _HEAD_FILE, _BACKBONE_FOLDER = "value_model_config.json", "value_head.safetensors", "backbone"
_ADAPTER_FOLDER = f"{_BACKBONE_FOLDER}/{_ADAPTER}"  # PEFT writes an adapter not called "default" into its own folder


class ValueModel(nn.Module):
    """
    `V(s)` for every prefix of a token sequence.

    Use [`ValueModel.from_policy`] to build one for training and [`ValueModel.from_pretrained`] to load one.

    Args:
        backbone ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Decoder without a language-modelling head. `None` for a head whose hidden states are handed in.
        hidden_size (`int`):
            Width of the hidden states.
        kind (`str`):
            `"adapter"`, `"full"` or `"head"`.
        objective (`str`, *optional*, defaults to `"regression"`):
            What the head's output is: a value (`"regression"`), or the log-odds of the reward 1 (`"classification"`).

    Example:

    ```python
    >>> value_model = ValueModel.from_pretrained("my-oreo-run/value_model")
    >>> value_model.score([tokenizer("2 + 2 = 4").input_ids, tokenizer("2 + 2 = 5").input_ids])
    [0.83, 0.11]
    ```
    """

    def __init__(
        self,
        backbone: PreTrainedModel | PeftModel | None,
        hidden_size: int,
        kind: ValueModelKind,
        objective: ValueObjective = "regression",
    ):
        super().__init__()
        if objective not in VALUE_OBJECTIVES:
            raise ValueError(f"`objective` must be 'regression' or 'classification', got {objective!r}.")
        self.kind = kind
        self.objective = objective
        self.backbone = backbone
        self.head = nn.Linear(hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        raw: bool = False,
        **images: Tensor,
    ) -> Tensor:
        """
        Values in units of reward, float32, `(B, L)`: entry `t` is that of the state after token `t`.

        Either token ids `(B, L)` (with their padding mask) or a policy's last hidden states `(B, L, H)` are given; the
        latter are detached, so that a value loss never moves the policy. A value learned by classification is the
        chance of the reward 1; with `raw=True` its log-odds are returned, which a loss needs. What a processor made of
        images goes beside token ids.
        """
        if hidden_states is not None:
            hidden_states = hidden_states.detach()
        else:
            if self.backbone is None:
                raise ValueError(
                    "This value model is a head on a policy's hidden states and has no backbone of its own. Pass "
                    "`hidden_states`, or load it with `ValueModel.from_pretrained(…, policy=…)`."
                )
            # Below a head lies the policy, which no value loss may move
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.kind != "head"):
                outputs = self.backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **images)
            hidden_states = outputs.last_hidden_state
        # A regression: bfloat16 would round values near 1 to steps of 1/128
        with torch.autocast(hidden_states.device.type, enabled=False):
            outputs = nn.functional.linear(hidden_states.to(self.head.weight.dtype), self.head.weight).squeeze(-1)
            return outputs if raw or self.objective == "regression" else outputs.sigmoid()

    @torch.no_grad()
    def score(self, sequences: list[list[int]], batch_size: int = 8) -> list[float]:
        """
        Value of the state after the last token of each sequence; by classification, the chance of the reward 1.

        Args:
            sequences (`list[list[int]]`): token ids from the start of the prompt, of any lengths above 0.
            batch_size (`int`, *optional*, defaults to `8`): sequences of one forward pass.
        """
        if self.backbone is None:
            raise ValueError(
                "This value model is a head that is handed its policy's hidden states, so it cannot read tokens. "
                "Save it and load it with `ValueModel.from_pretrained(folder, policy=policy)`."
            )
        if not all(sequences):
            raise ValueError(
                "A sequence has no token, so there is no state to value. Pass the prompt's tokens at least."
            )
        refuse_missing_images(self.backbone.config, sequences)
        was_training = self.training
        self.eval()
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            length = len(sequences[rows[-1]])
            ids = torch.zeros(len(rows), length, dtype=torch.long, device=self.head.weight.device)
            mask = torch.zeros_like(ids)
            for k, row in enumerate(rows):
                ids[k, : len(sequences[row])] = torch.tensor(sequences[row])
                mask[k, : len(sequences[row])] = 1
            values = self(ids, mask).gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)
            for row, value in zip(rows, values.tolist(), strict=True):
                scores[row] = value
        self.train(was_training)
        return scores

    def standing_on(self, policy: PreTrainedModel | PeftModel) -> ValueModel:
        """
        A head that reads tokens: this one, over the decoder of its policy. Another kind is returned as it is.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): whose hidden states the head is handed.
        """
        if self.kind != "head" or self.backbone is not None:
            return self
        standing = ValueModel(cast(PreTrainedModel, decoder(policy)), self.head.in_features, self.kind, self.objective)
        standing.head = self.head
        return standing.train(self.training)

    @classmethod
    def from_policy(
        cls,
        policy: PreTrainedModel | PeftModel,
        kind: ValueModelKind,
        base: PreTrainedModel | None = None,
        lora_rank: int = 64,
        lora_alpha: int = 64,
        objective: ValueObjective = "regression",
    ) -> ValueModel:
        """
        Build a value model that starts from a policy.

        Args:
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): causal language model, never changed.
            kind (`str`): see the module's documentation.
            base ([`~transformers.PreTrainedModel`], *optional*): for an adapter beside a policy without adapters,
                whose own weights move: a frozen causal language model, usually the reference, to share the weights of.
                Without it the policy's present weights are copied.
            lora_rank, lora_alpha (`int`, *optional*, default to `64`): of the adapter, on all linear layers (OREO's
                setting at 7B).
            objective (`str`, *optional*, defaults to `"regression"`): as in the class.

        Raises:
            `ValueError`: if `kind` or `objective` is unknown, or a full value model is asked for beside quantized
                weights.
        """
        if kind not in ("adapter", "full", "head"):
            raise ValueError(f"`value_model={kind!r}` is unknown. Choose 'adapter', 'full' or 'head'.")
        hidden_size = policy.config.get_text_config().hidden_size
        if kind == "head":
            return cls(None, hidden_size, kind, objective).to(_device(policy))
        if kind == "full":
            if getattr(policy, "is_loaded_in_4bit", False) or getattr(policy, "is_loaded_in_8bit", False):
                raise ValueError(
                    "The policy's weights are quantized and cannot be trained as a second full model. Use "
                    "`value_model='adapter'`, or load the policy without `quantization_config`."
                )
            backbone: PreTrainedModel | PeftModel = _bare_backbone(copy.deepcopy(policy), merge=True)
            backbone.requires_grad_(True)
        else:
            shares_policy = isinstance(policy, PeftModel)
            owner = policy if shares_policy else base
            backbone = _bare_backbone(copy.deepcopy(policy) if owner is None else _with_shared_weights(owner))
            backbone.requires_grad_(False)
            config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, lora_dropout=0.0, target_modules="all-linear")
            backbone = get_peft_model(cast(PreTrainedModel, backbone), config, adapter_name=_ADAPTER)
        return cls(backbone, hidden_size, kind, objective).to(_device(policy))

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """
        Write the value model to `folder`: its head, and the backbone or adapter where it has one of its own.

        Args:
            folder (`str` or `Path`): made where absent. By convention `value_model/` beside the policy's files.
            state_dict (`dict[str, Tensor]`, *optional*): the gathered weights, where `self` holds only shards.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = self.state_dict() if state_dict is None else state_dict
        save_file({"weight": weights["head.weight"].detach().cpu().contiguous()}, folder / _HEAD_FILE)
        config = {"kind": self.kind, "hidden_size": self.head.in_features, "objective": self.objective}
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.kind != "head":
            prefix = "backbone."
            own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            kwargs: dict[str, Any] = {"selected_adapters": [_ADAPTER]} if self.kind == "adapter" else {}
            self._own_backbone().save_pretrained(str(folder / _BACKBONE_FOLDER), state_dict=own, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        policy: PreTrainedModel | PeftModel | None = None,
        is_trainable: bool = False,
        **model_kwargs: Any,
    ) -> ValueModel:
        """
        Load what [`ValueModel.save_pretrained`] wrote.

        Args:
            folder (`str` or `Path`): a `value_model` folder.
            policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*): whose weights an adapter or
                a head stands on. By default an adapter loads the base model that it names, and a head the policy
                beside whose files it lies.
            is_trainable (`bool`, *optional*, defaults to `False`): keep gradients of the trained parts.
            **model_kwargs: for the `from_pretrained` of whatever backbone is loaded, e.g. `dtype`.

        Raises:
            `ValueError`: if `folder` holds no value model.
        """
        folder = Path(folder)
        if not (folder / _CONFIG_FILE).exists():
            raise ValueError(
                f"`{folder}` has no `{_CONFIG_FILE}`, so it is no value model. Pass the `value_model` folder inside a "
                "checkpoint, not the checkpoint."
            )
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
        kind = config["kind"]
        if kind == "full":
            backbone = AutoModel.from_pretrained(folder / _BACKBONE_FOLDER, **model_kwargs)
        elif kind == "head":
            policy = (
                policy if policy is not None else AutoModelForCausalLM.from_pretrained(folder.parent, **model_kwargs)
            )
            backbone = decoder(policy)
        else:
            backbone = _load_adapter(folder / _ADAPTER_FOLDER, policy, is_trainable, model_kwargs)
        objective = config.get("objective", "regression")
        value_model = cls(backbone, config["hidden_size"], kind, objective).to(_device(backbone))
        value_model._load_head(folder)
        if kind == "head":
            value_model.head.requires_grad_(is_trainable)
        elif not is_trainable:
            value_model.requires_grad_(False)
        return value_model.eval()

    def load_weights(self, folder: str | Path) -> None:
        """Read the weights of a saved value model of the same kind into this one, in place."""
        folder = Path(folder)
        config = json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))
        kind, objective = config["kind"], config.get("objective", "regression")
        if kind != self.kind:
            raise ValueError(
                f"`{folder}` holds a value model of kind {kind!r}, but this one is {self.kind!r}. Continue with "
                f"`value_model={kind!r}`."
            )
        if objective != self.objective:
            raise ValueError(
                f"`{folder}` holds a value model learned by {objective}, but this one learns by {self.objective}: its "
                f"outputs mean something else. Continue with `value_objective={objective!r}`."
            )
        self._load_head(folder)
        if kind == "adapter":
            self._own_backbone().load_adapter(str(folder / _ADAPTER_FOLDER), _ADAPTER, is_trainable=True)
        elif kind == "full":
            saved = AutoModel.from_pretrained(folder / _BACKBONE_FOLDER, dtype=self._own_backbone().dtype)
            self._own_backbone().load_state_dict(saved.state_dict())

    @staticmethod
    def saved_weights(folder: str | Path) -> dict[str, Tensor]:
        """
        The weights of a saved head or full value model, named as in its state dict, where `load_weights` cannot copy
        them because the model is sharded over processes.
        """
        folder = Path(folder)
        weights = {"head.weight": load_file(folder / _HEAD_FILE)["weight"]}
        if json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))["kind"] == "full":
            backbone = AutoModel.from_pretrained(folder / _BACKBONE_FOLDER)
            weights |= {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
        return weights

    def _own_backbone(self) -> Any:
        """The backbone of a value model that has one (a PEFT model or a plain one)."""
        assert self.backbone is not None, f"a value model of kind {self.kind!r} has no backbone of its own"
        return self.backbone

    def _load_head(self, folder: Path) -> None:
        with torch.no_grad():
            self.head.weight.copy_(load_file(folder / _HEAD_FILE)["weight"])


def decoder(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The decoder below a language-modelling head, with whatever adapters it carries."""
    return cast(nn.Module, (model.get_base_model() if isinstance(model, PeftModel) else model).base_model)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _bare_backbone(model: PreTrainedModel | PeftModel, merge: bool = False) -> PreTrainedModel:
    """The decoder without adapters, which are merged or dropped; `model` is used up."""
    if isinstance(model, PeftModel):
        model = cast(PreTrainedModel, model.merge_and_unload() if merge else model.unload())
    return cast(PreTrainedModel, model.base_model)


def _with_shared_weights(model: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    """
    A copy of the module tree over the *same* parameters.

    Adapters can then be added without touching the original's forward pass, and no global switch decides whose turn it
    is: gradient checkpointing, which runs layers again in the backward pass, would read such a switch too late.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def _load_adapter(
    folder: Path, policy: PreTrainedModel | PeftModel | None, is_trainable: bool, model_kwargs: dict[str, Any]
) -> PeftModel:
    if policy is not None:
        backbone = _bare_backbone(_with_shared_weights(policy))
    else:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not base:
            raise ValueError(
                f"The value adapter in `{folder}` does not say which base model it stands on, because that model had "
                "no name when training started. Pass `policy=`: the LoRA policy, or the model training started from."
            )
        backbone = _bare_backbone(AutoModelForCausalLM.from_pretrained(base, **model_kwargs))
    return PeftModel.from_pretrained(backbone, folder, adapter_name=_ADAPTER, is_trainable=is_trainable)
