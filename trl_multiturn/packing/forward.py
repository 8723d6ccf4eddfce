"""
The packed path of a model: hooks around the fused forward that TRL gives it.

TRL's trainers call `model(input_ids, attention_mask, labels, fused_lm_head=True)` and read padded `(B, L - 1)` fields.
What is in between is theirs: wrapping (PEFT, DDP, autocast), the router's auxiliary loss, the meaning of each field.
So nothing is replaced; PyTorch's hooks change what goes in and what comes out:

    before the model      batch            -> packed row, and the scored tokens as `shift_labels`
    before the backbone   no mask          -> a NaN mask, which only the packed attention ignores
    in its last layer     all states       -> the feed-forward block on those that predict a scored token
    (a long row)          the row          -> slice by slice, see `slices`; the backbone's own call gets one token
    after the backbone    hidden states    -> those that predict a scored token
    after the model       scores           -> the padded fields of the batch that came in

The losses never see the difference. Hooks sit at the module's call, outside what accelerate wraps around `forward`, so
they can be put on before or after it prepares the model, and they are removed without a trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .attention import packed_arguments, poison_mask, switch_attention
from .decoder import CAPTURED, ROWS_IN_FLIGHT, without_adapters
from .fused import FusedLayer, fuse_layers
from .last_layer import READ, LastFeedForward
from .plan import Plan, PlanCache, chunk_overhead
from .row import PackedRow
from .scored_head import FIELDS, TokenScores, score_tokens
from .sequences import sequences_of
from .slices import RowSlice, SlicedScores, slice_tokens


# What a call may carry for us to answer it; anything else (images, token types) goes by unchanged
_KNOWN = {"input_ids", "attention_mask", "labels", "fused_lm_head", "use_cache", "output_router_logits"}

# Config names by which architectures scale their logits; TRL's head knows what each means, so it scores those
_LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")

# Weak both ways: a model's hooks keep its PackedForward alive, and nothing here keeps the model
_INSTALLED: WeakKeyDictionary[nn.Module, ref[PackedForward]] = WeakKeyDictionary()


def packed_forward_of(model: nn.Module) -> PackedForward | None:
    """The [`PackedForward`] that is installed on a model, if any."""
    reference = _INSTALLED.get(model)
    return None if reference is None else reference()


class PackedForward:
    """
    Answers a model's `fused_lm_head=True` calls from a packed row.

    Args:
        model (`PreTrainedModel` or `PeftModel`): a causal LM that went through TRL's `add_fused_lm_head`.
        fields (`Iterable[str]`, *optional*): per-token fields to return besides `log_probs`, as TRL's `outputs`.
        pack (`bool` or `"auto"`, *optional*, defaults to `"auto"`): whether batches are packed; `"auto"` packs those
            whose shapes say that it pays. With `False` every batch stays padded and only the LM head is spared the
            tokens that are not scored, which is exact for every architecture.
        plans ([`PlanCache`], *optional*): another model's, to plan a batch once for the policy and its reference.
        slices (`int`, *optional*): rows of more tokens are computed in slices of so many, 0 for never. By default, on
            a CPU, long rows of a model with gradient checkpointing are.
        fuse (`bool`, *optional*): whether decoder layers of a known kind are computed from few operators (see
            [`FusedLayer`]). By default they are on a GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        fields: Iterable[str] = (),
        pack: bool | str = "auto",
        plans: PlanCache | None = None,
        slices: int | None = None,
        fuse: bool | None = None,
    ) -> None:
        self.model = model
        self.causal_lm = without_adapters(model)
        self.backbone = cast(PreTrainedModel, self.causal_lm.base_model)
        self.fields = tuple(name for name in FIELDS if name in fields)
        self.enabled = True
        self.calls: dict[str, int] = {"packed": 0, "padded": 0}
        self._pack = pack
        self._slices, self._fuse = slices, fuse
        self.fused: list[FusedLayer] = []
        self.reason_against_fusing: str | None = None  # where a trial failed
        self._slice_tokens = 0  # of the present call; 0 where it is not cut
        self.last_plan: Plan | None = None
        self._plan: Plan | None = None
        self._scores: TokenScores | None = None
        self.plans = PlanCache() if plans is None else plans
        self._handles: list[RemovableHandle] = []
        self._last: LastFeedForward | None = None
        self._implementation_before: str | None = None

    def install(self) -> PackedForward:
        """Put the hooks on, and the packed attention where rows may be packed."""
        previous = packed_forward_of(self.model)
        if previous is not None:
            previous.remove()  # another trainer's, of the same model
        _INSTALLED[self.model] = ref(self)
        if self._pack:
            self._implementation_before = switch_attention(self.causal_lm)
            self._last = LastFeedForward(self.backbone)
            on_gpu = next(self.backbone.parameters()).device.type == "cuda"
            if self._fuse or (self._fuse is None and on_gpu):
                self.fused = fuse_layers(self.backbone)
        self._handles = [
            # First, as `expanded` takes the branching batches that are left
            self.model.register_forward_pre_hook(self._before_model, with_kwargs=True, prepend=True),
            self.backbone.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            self.backbone.register_forward_hook(self._after_backbone, always_call=True),
            self.model.register_forward_hook(self._after_model, always_call=True),
        ]
        return self

    def remove(self) -> None:
        """Take everything back; the model is as it came."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if packed_forward_of(self.model) is self:
            del _INSTALLED[self.model]
        self.stop_packing()

    @property
    def packs(self) -> bool:
        """Whether batches may be packed; else only the LM head is spared what is not scored."""
        return bool(self._pack)

    @contextmanager
    def as_it_came(self) -> Iterator[None]:
        """The model with the attention it came with; its calls are not packed."""
        config = self.causal_lm.config.get_text_config()
        packed, before = config._attn_implementation, self._implementation_before
        self.enabled = False
        try:
            if before is not None:
                self.causal_lm.set_attn_implementation(before)
            yield
        finally:
            self.enabled = True
            self.causal_lm.set_attn_implementation(packed)

    def unfuse(self) -> None:
        """Let the layers compute as they came."""
        for layer in self.fused:
            layer.remove()
        self.fused = []

    def stop_packing(self) -> None:
        """Keep the batches padded from now on, with the attention the model came with."""
        self._pack = False
        self.unfuse()
        self.plans.clear()
        if self._last is not None:
            self._last.remove()
            self._last = None
        if self._implementation_before is not None:
            self.causal_lm.set_attn_implementation(self._implementation_before)
            self._implementation_before = None

    def plan(self, kwargs: dict[str, Any]) -> Plan | None:
        """The plan for a call, or `None` for a call that is not ours."""
        if not self.enabled or not kwargs.get("fused_lm_head"):
            return None
        if any(value is not None for name, value in kwargs.items() if name not in _KNOWN):
            return None
        input_ids, labels = kwargs.get("input_ids"), kwargs.get("labels")
        if input_ids is None or labels is None:
            return None
        hidden_size = self.causal_lm.config.get_text_config().hidden_size
        overhead = chunk_overhead(hidden_size, input_ids.device, self.causal_lm.dtype)
        return self.plans.plan(input_ids, kwargs.get("attention_mask"), labels, pack=self._pack, overhead=overhead)

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self._plan = self._scores = None
        plan = None if args else self.plan(kwargs)
        if plan is None:
            return None
        if plan.row is None and (sequences_of(kwargs["input_ids"]) is not None or not self._scores_here()):
            return None  # TRL's own head already skips what is not scored
        self._plan = self.last_plan = plan
        self._slice_tokens = self._tokens_of_a_slice(plan, kwargs)
        self.calls["padded" if plan.row is None else "packed"] += 1
        kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
        ours = self._scores_here() or self._slice_tokens
        targets = plan.targets if not ours else plan.targets[:0]
        kwargs["shift_labels"] = targets[None]
        if plan.row is not None:
            # Without a mask, so that the router's balancing loss counts every state that it is given
            kwargs |= {"input_ids": plan.row.input_ids, "attention_mask": None}
        return args, kwargs

    def _before_backbone(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._plan is None:
            return None
        if self._plan.row is not None and self._slice_tokens:
            return args, self._score_in_slices(self._plan, self._plan.row, kwargs)
        if self._plan.row is not None:
            ROWS_IN_FLIGHT[module] = self._plan.row
            arguments = packed_arguments(self._plan.row, kwargs, self.causal_lm.dtype)
            whole = module in CAPTURED or kwargs.get("output_router_logits")
            if self._last is not None and self._last.acts and not whole:
                arguments[READ] = self._last, self._plan.read
            return args, arguments
        if self._pack and self._plan.right_padded and not kwargs.get("output_router_logits"):
            # A token never sees the padding to its right, and without a mask attention takes its causal fast path
            return args, kwargs | {"attention_mask": None}
        return None

    def _after_backbone(self, module: nn.Module, args: tuple, output: Any) -> Any:
        plan = self._plan
        ROWS_IN_FLIGHT.pop(module, None)
        if plan is None or output is None:
            return None
        hidden = output.last_hidden_state
        if self._scores is not None:  # of a row in slices, of which this was one token
            output.last_hidden_state = hidden[:, :0]
            return output
        selected = hidden.flatten(0, 1).index_select(0, plan.sources)
        if self._scores_here():
            self._scores = self._score(selected, plan.targets)
            selected = selected[:0]
        output.last_hidden_state = selected[None]
        if plan.row is not None and getattr(output, "router_logits", None) is not None:
            # The balancing loss counts a shared token once per sequence, as the padded batch does
            output.router_logits = tuple(logits[plan.row.paths] for logits in output.router_logits)
        return output

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> Any:
        plan, scores = self._plan, self._scores
        self._plan = self._scores = None
        if plan is None or output is None:
            return None
        for name in ("log_probs", *FIELDS):
            score = getattr(output, name) if scores is None else getattr(scores, name)
            if score is not None:
                setattr(output, name, plan.scatter(score.flatten()))
        output.label_mask = plan.mask
        output.loss = -output.log_probs.sum() / plan.mask.sum().clamp(min=1)
        if output.aux_loss is not None:
            config = self.causal_lm.config.get_text_config()
            output.loss = output.loss + getattr(config, "router_aux_loss_coef", 0.0) * output.aux_loss
        return output

    def _score(self, hidden: Tensor, targets: Tensor, with_fields: bool = True) -> TokenScores:
        head = self._head()
        softcap = getattr(self.causal_lm.config.get_text_config(), "final_logit_softcapping", None)
        fields = self.fields if with_fields else ()
        return score_tokens(hidden, head.weight, head.bias, targets, softcap=softcap, fields=fields)

    def _tokens_of_a_slice(self, plan: Plan, kwargs: dict[str, Any]) -> int:
        """Tokens of the slices in which a call's row is computed; 0 where it is computed at once."""
        row = plan.row
        if row is None or self._slices == 0 or self.backbone in CAPTURED or kwargs.get("output_router_logits"):
            return 0
        if not self._has_plain_head() or (dist.is_initialized() and dist.get_world_size() > 1):
            return 0  # gradients arrive where no reducer waits for them
        if self._slices is not None:
            return self._slices if len(row) > self._slices else 0
        tokens = slice_tokens(len(row), self.causal_lm.config.get_text_config().num_hidden_layers)
        wanted = row.input_ids.device.type == "cpu" and torch.is_grad_enabled() and checkpoints(self.causal_lm)
        return tokens if wanted and len(row) > 4 * tokens else 0

    def _score_in_slices(self, plan: Plan, row: PackedRow, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Scores the plan's tokens; arguments for the call that this stands in for."""
        device = row.input_ids.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        others = kwargs | {"attention_mask": poison_mask(row, self.causal_lm.dtype)}

        def run(ids: Tensor, positions: Tensor, part: RowSlice) -> Tensor:
            states = self.backbone(**others | {"input_ids": ids, "position_ids": positions, "packed_row": part})
            return cast(Tensor, states.last_hidden_state[0])

        @contextmanager
        def as_now() -> Iterator[None]:
            with torch.autocast(device, dtype=autocast[1], enabled=autocast[0]), without_checkpoints(self.causal_lm):
                yield

        self._plan = None  # the decoder's calls of a slice are none of ours
        try:
            self._scores = SlicedScores(plan, self._slice_tokens, run, self._score, as_now)()
        finally:
            self._plan = plan
        return kwargs | {"input_ids": row.input_ids[:, :1], "attention_mask": None}

    def _has_plain_head(self) -> bool:
        """Whether the head is a linear map whose logits are at most soft-capped."""
        head, config = self._head(), self.causal_lm.config.get_text_config()
        return (
            type(head) is nn.Linear
            and type(head.weight) is nn.Parameter
            and all(getattr(config, name, None) is None for name in _LOGIT_SCALES)
        )

    def _head(self) -> nn.Linear:
        """The output embeddings in use: where PEFT trains a copy (`modules_to_save`), that of the active adapter."""
        head: Any = self.causal_lm.get_output_embeddings()
        if not isinstance(getattr(head, "modules_to_save", None), nn.ModuleDict):
            return head
        saved = [name for name in head.active_adapters if name in head.modules_to_save]
        if head.disable_adapters or not saved:
            return head.original_module
        return head.modules_to_save[saved[0]]

    def _scores_here(self) -> bool:
        """Whether our head scores: off CUDA, where it is plain."""
        return self._has_plain_head() and self._head().weight.device.type == "cpu"


def checkpoints(model: nn.Module) -> bool:
    """Whether a model in training computes its layers again in the backward pass."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@contextmanager
def without_checkpoints(model: nn.Module) -> Iterator[None]:
    """Inside, no layer is computed again in the backward pass."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in modules:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]
