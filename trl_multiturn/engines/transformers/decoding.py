"""The live batch of an in-process policy: requests join, one token per step, requests leave. No threads here."""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...precision import matmul_uses_tf32
from ..engine import Generation, SamplingParams
from .compatibility import attention_windows, refuse_different_logits, refuse_uncertain_window
from .kv_cache import RetainedCaches, SlotCache, round_up
from .sampler import TokenSampler
from .slot_attention import uses_slot_attention
from .stop_strings import StopStringMatcher


# Matrix kernels treat fewer rows than this differently (GEMV, short tails): below it, the last bits of a row's result
# would depend on how many rows share the batch. Attention treats every row alone, so it leaves the padding out, but it
# sums in lanes, so its length is rounded up as well.
ROW_MULTIPLE = 16
COLUMN_MULTIPLE = 32


@dataclass(eq=False)
class DecodingRequest:
    """One turn to sample, and how far it is.

    Attributes:
        prompt_ids (`list[int]`): what the policy reads.
        sampling ([`SamplingParams`]): how to sample.
        session (`str`, *optional*): name under which the cache is kept when the turn is over.
        rng (`random.Random`): the request's own source of uniform numbers.
        images (`tuple`): what the image tokens of the prompt show.
        cancelled (`bool`): nobody waits for the result any more.
        token_ids, logps (`list`): what was sampled so far.
        finish_reason (`str`, *optional*): set when the turn is over.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    session: str | None
    rng: random.Random
    images: tuple[Any, ...] = ()
    cancelled: bool = False
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(self.sampling.stop_token_ids)
        # The token fed next, and its position: all tokens before it are in the cache.
        self.next_token = self.prompt_ids[-1]
        self.position = len(self.prompt_ids) - 1

    def accept(self, token: int, logp: float, matcher: StopStringMatcher) -> bool:
        """Takes a sampled token; returns whether the turn is over."""
        self.token_ids.append(token)
        self.logps.append(logp)
        sampling = self.sampling
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif sampling.stop_strings and matcher.matches(self.token_ids, sampling.stop_strings):
            self.finish_reason = "stop_string"
        elif len(self.token_ids) >= sampling.max_new_tokens:
            self.finish_reason = "length"
        else:
            self.next_token = token
            self.position += 1
            return False
        return True

    def generation(self) -> Generation:
        return Generation(token_ids=self.token_ids, logps=self.logps, finish_reason=self.finish_reason)

    def cached_ids(self) -> list[int]:
        """The tokens whose keys and values are in the cache: all that were fed."""
        return (self.prompt_ids + self.token_ids)[: self.position + 1]


class DecodingBatch:
    """Rows of a [`SlotCache`] that advance together by one token per step.

    A joining row's prompt, but for its last token, is read in a forward pass of its own (only the part that its
    session's retained cache does not hold); the last token is then fed like any sampled one, so that every draw comes
    from the same kind of step. Equal prompts that join together are read once.

    Args:
        model (`torch.nn.Module`):
            What is called: the policy, or PEFT's shell around it. It gets `input_ids`, `position_ids`,
            `past_key_values` and a 4-D `attention_mask` (or a dict of them by layer type).
        policy ([`~transformers.PreTrainedModel`]):
            The decoder inside.
        matcher ([`StopStringMatcher`]):
            For stop strings.
        retained ([`RetainedCaches`]):
            Caches of sessions between turns.
        max_prefill_tokens (`int`):
            Most tokens, padding included, of one prefill pass.
        max_batch_size (`int`):
            Most rows.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: PreTrainedModel,
        matcher: StopStringMatcher,
        retained: RetainedCaches,
        max_prefill_tokens: int,
        max_batch_size: int,
    ) -> None:
        self.rows: list[DecodingRequest] = []
        self.prefilled_tokens = 0
        self.steps = 0
        self.model = model
        self._matcher = matcher
        self._retained = retained
        self._max_prefill_tokens = max(max_prefill_tokens, ROW_MULTIPLE)
        self.policy = policy
        self._max_rows = max(max_batch_size, ROW_MULTIPLE)
        self._windows, self._uncertain_window = attention_windows(policy)
        self._layer_types = getattr(policy.config.get_text_config(decoder=True), "layer_types", None)
        # Without it, all logits of a prompt are computed and thrown away.
        keeps_logits = "logits_to_keep" in inspect.signature(type(policy).forward).parameters
        self._options = {"use_cache": True} | ({"logits_to_keep": 1} if keeps_logits else {})
        self.drop_buffers()
        self._sampler: TokenSampler | None = None
        self._proven = False

    @property
    def device(self) -> torch.device:
        return self.policy.get_input_embeddings().weight.device

    def drop_buffers(self) -> None:
        """Frees the shared cache. Only while no row is live."""
        self._cache = SlotCache(len(self._windows), self._max_rows)

    def join(self, requests: Sequence[DecodingRequest]) -> None:
        """Admits requests: fills their rows from retained caches and reads the rest of their prompts.

        Raises:
            ValueError: the first time, if the model cannot be sampled from a shared cache.
        """
        if not self._proven:
            refuse_different_logits(self, precise=_computes_in_float32(self.model, self.policy))
            self._proven = True
        sources: dict[tuple[int, ...], DecodingRequest] = {}
        copies: list[tuple[DecodingRequest, DecodingRequest]] = []
        fresh: list[tuple[int, DecodingRequest]] = []
        resumed = []
        for request in requests:
            retained = self._retained.pop(request.session) if request.session is not None else None
            cached = retained.common_prefix(request.prompt_ids[:-1]) if retained else 0
            if cached:
                resumed.append((request, retained, cached))
            elif (source := sources.setdefault(tuple(request.prompt_ids), request)) is not request:
                copies.append((request, source))
                continue
            fresh.append((cached, request))
        # Neighbours of similar length share a pass with little padding.
        fresh.sort(key=lambda item: item[1].position - item[0])
        first = len(self.rows)
        self.rows += [request for _, request in fresh] + [request for request, _ in copies]
        self._sampler = None
        index = {id(request): row for row, request in enumerate(self.rows[first:], start=first)}
        longest = max(request.position for request in requests)
        self._cache.reserve(max(len(self.rows), ROW_MULTIPLE), longest + ROW_MULTIPLE + 1)
        for request, retained, cached in resumed:
            self._cache.attach_row(index[id(request)], retained, cached)
        self._prefill(first, [cached for cached, _ in fresh])
        for request, source in copies:
            self._cache.copy_row(index[id(source)], index[id(request)], request.position)

    def step(self) -> list[DecodingRequest]:
        """Samples one token for every row. Rows that were cancelled leave; rows whose turn is over leave and are
        returned."""
        self._remove([row for row, request in enumerate(self.rows) if request.cancelled], retain=False)
        if not self.rows:
            return []
        self.steps += 1
        device, count = self.device, len(self.rows)
        padding = [0] * max(0, ROW_MULTIPLE - count)
        token_ids = torch.tensor([r.next_token for r in self.rows] + padding, device=device).unsqueeze(1)
        positions = torch.tensor([r.position for r in self.rows] + padding, device=device).unsqueeze(1)
        length = max(r.position for r in self.rows) + 1
        if self._uncertain_window is not None:
            refuse_uncertain_window(self.policy, self._uncertain_window, length)
        self._cache.reserve(len(token_ids), length)
        logits = self._forward(0, token_ids, positions, positions, length, live=count)[:count, 0]
        if self._sampler is None:
            self._sampler = TokenSampler([r.sampling for r in self.rows], device)
        uniforms = torch.tensor([r.rng.random() for r in self.rows], dtype=torch.float32, device=device)
        sampled, logps = self._sampler(logits, uniforms)
        finished = []
        for row, (token, logp) in enumerate(zip(sampled.tolist(), logps.tolist(), strict=True)):
            if logp != logp:
                raise FloatingPointError(
                    "The policy's logits are not finite, so no token can be sampled. Its weights have diverged: "
                    "lower the learning rate or clip gradients, and restart from an earlier checkpoint."
                )
            if self.rows[row].accept(token, logp, self._matcher):
                finished.append(row)
        return self._remove(finished, retain=True)

    def decode_known(self, token_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Logits `(count, V)` after the last `count` of `token_ids`, `(1, T)`, each read by a step of its own. Only
        while no row is live."""
        read, length = token_ids.shape[1] - count, token_ids.shape[1]
        self._cache.reserve(ROW_MULTIPLE, length)
        columns = torch.arange(length, device=self.device).unsqueeze(0)
        self._forward(0, token_ids[:, :read], columns[:, :read], columns[:, :read], read)
        logits = []
        for column in range(read, length):
            step_ids, positions = torch.zeros(2, ROW_MULTIPLE, 1, dtype=torch.long, device=self.device)
            step_ids[0], positions[0] = token_ids[0, column], column
            # Two rows: keys of one alone would fit any number of queries.
            logits.append(self._forward(0, step_ids, positions, positions, column + 1, live=2)[0, 0])
        return torch.stack(logits)

    def clear(self) -> list[DecodingRequest]:
        """Forgets every live row, e.g. after an error, and returns their requests."""
        rows, self.rows = self.rows, []
        self._sampler = None
        self.drop_buffers()
        return rows

    def _remove(self, rows: list[int], retain: bool) -> list[DecodingRequest]:
        removed = []
        # From the end, so that the last row, which fills the hole, is never one that leaves as well.
        for row in reversed(rows):
            request = self.rows[row]
            if retain and request.session is not None and not request.cancelled:
                self._retained.put(request.session, self._cache.detach_row(row, request.cached_ids()))
            last = self.rows.pop()
            if last is not request:
                self.rows[row] = last
                self._cache.copy_row(len(self.rows), row, last.position)
            removed.append(request)
        if rows:
            self._sampler = None
        return removed[::-1]

    def _prefill(self, first: int, cached: list[int]) -> None:
        """Reads what is left of the prompts of rows `first, first + 1, …`, sorted by what is left."""
        done = 0
        while done < len(cached):
            # Rows are taken while their padded rectangle, as wide as the last (longest) of them, stays in the budget.
            take = 0
            while done + take < len(cached):
                row = first + done + take
                wide = round_up(self.rows[row].position - cached[done + take], ROW_MULTIPLE)
                if take and wide * (take + 1) > self._max_prefill_tokens:
                    break
                take, width = take + 1, wide
            self._prefill_rows(first + done, cached[done : done + take], width)
            done += take

    def _prefill_rows(self, first: int, starts: list[int], width: int) -> None:
        rows = self.rows[first : first + len(starts)]
        chunk = max(ROW_MULTIPLE, self._max_prefill_tokens // len(rows) // ROW_MULTIPLE * ROW_MULTIPLE)
        self._cache.reserve(first + len(rows), max(starts) + width)
        device = self.device
        start_column = torch.tensor(starts, device=device).unsqueeze(1)
        last_column = torch.tensor([r.position for r in rows], device=device).unsqueeze(1)
        for offset in range(0, width, chunk):
            size = min(chunk, width - offset)
            token_ids = []
            for request, start in zip(rows, starts, strict=True):
                tokens = request.prompt_ids[start + offset : min(start + offset + size, request.position)]
                token_ids.append(tokens + [0] * (size - len(tokens)))
                self.prefilled_tokens += len(tokens)
            columns = start_column + torch.arange(offset, offset + size, device=device)
            # Padding is written behind the row's tokens, where it is masked and later overwritten; its position only
            # has to be one that the model knows.
            positions = torch.minimum(columns, last_column)
            length = max(starts) + offset + size
            self._forward(first, torch.tensor(token_ids, device=device), positions, columns, length)

    def _forward(
        self,
        first: int,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        columns: torch.Tensor,
        length: int,
        live: int | None = None,
    ) -> torch.Tensor:
        """Runs rows from `first` on; tensors are `(N, Q)`, `length` is one more than the largest of `columns`. The
        rows behind the first `live` (all by default) are padding, whose results mean nothing. Returns the logits of
        the last token of each row, `(N, 1, V)`."""
        if live is None or not uses_slot_attention(self.policy):
            live = len(token_ids)
        # The buffer's length is a multiple of this one too.
        visible = round_up(length, COLUMN_MULTIPLE)
        self._cache.focus(first, live, columns, visible)
        output = self.model(
            input_ids=token_ids,
            attention_mask=self._masks(columns, visible),
            position_ids=positions,
            past_key_values=self._cache,
            **self._options,
        )
        return output.logits[:, -1:]

    def _masks(self, columns: torch.Tensor, visible: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """`(N, 1, Q, K)` masks: a token sees the columns up to its own, within its layer's window."""
        keys = torch.arange(visible, device=columns.device)
        queries = columns[:, None, :, None]
        causal = keys <= queries
        by_window = {
            window: self._in_model_format(causal if window is None else causal & (keys > queries - window))
            for window in set(self._windows)
        }
        if len(by_window) == 1:
            return next(iter(by_window.values()))
        return {kind: by_window[window] for kind, window in zip(self._layer_types, self._windows, strict=True)}

    def _in_model_format(self, allowed: torch.Tensor) -> torch.Tensor:
        if self.policy.config._attn_implementation != "eager":
            return allowed
        dtype = self.policy.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
            ~allowed, torch.finfo(dtype).min
        )


def _computes_in_float32(model: nn.Module, policy: PreTrainedModel) -> bool:
    mixed = any(hasattr(module, "_original_forward") for module in (model, policy))  # Accelerate's mixed precision
    coarse = mixed or getattr(policy, "is_quantized", False) or matmul_uses_tf32()
    return policy.dtype == torch.float32 and not coarse
