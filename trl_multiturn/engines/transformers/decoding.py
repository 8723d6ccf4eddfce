"""The live batch of an in-process policy: requests join, one token per step, requests leave. No threads here."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..engine import Generation, SamplingParams
from .kv_cache import RetainedCaches, RetainedRow
from .packed_prompts import Piece
from .prompt_readers import PromptReaders
from .prompts import read_prompts
from .sampler import TokenSampler
from .slot_model import ROW_MULTIPLE, SlotModel
from .stop_strings import StopStringMatcher


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
        read_at_once (`int`): how many of the prompt's first tokens were read in one go, by this request or by the one
            that they were copied from.
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
    read_at_once: int = 0

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


Source = DecodingRequest | RetainedRow | None  # what already holds the beginning of a prompt


class DecodingBatch:
    """Rows of a [`SlotCache`] that advance together by one token per step.

    A joining row's prompt, but for its last token, is read in a forward pass of its own (only the part that its
    session's retained cache does not hold); the last token is then fed like any sampled one, so that every draw comes
    from the same kind of step. A prompt that another row or a retained cache holds, read in one go as well, is copied
    from there, which gives the same bits: the samples of a prompt read it once, whenever they join.

    Args:
        model (`torch.nn.Module`):
            What is called: the policy, or PEFT's shell around it; see [`SlotModel`].
        policy ([`~transformers.PreTrainedModel`]):
            The decoder inside.
        matcher ([`StopStringMatcher`]):
            For stop strings.
        retained ([`RetainedCaches`]):
            Caches of sessions between turns.
        max_prefill_tokens (`int`):
            Most tokens, padding included, of one pass over prompts.
        max_batch_size (`int`):
            Most rows.
        step_weights_bytes (`int`):
            Most bytes of copies of weights; see [`StepWeights`].
    """

    def __init__(
        self,
        model: nn.Module,
        policy: PreTrainedModel,
        matcher: StopStringMatcher,
        retained: RetainedCaches,
        max_prefill_tokens: int,
        max_batch_size: int,
        step_weights_bytes: int,
    ) -> None:
        self.rows: list[DecodingRequest] = []
        self.prefilled_tokens = 0
        self.steps = 0
        self.slots = SlotModel(model, policy, max_batch_size, step_weights_bytes)
        self._matcher = matcher
        self._retained = retained
        self._max_prefill_tokens = max(max_prefill_tokens, ROW_MULTIPLE)
        self._sampler: TokenSampler | None = None
        self._readers = PromptReaders()

    def drop_buffers(self) -> None:
        """Frees the shared cache and the copies of weights. Only while no row is live."""
        self.slots.drop_buffers()
        self.slots.step_weights.drop()
        self._readers.clear()

    def join(self, requests: Sequence[DecodingRequest]) -> None:
        """Admits requests: fills their rows from retained caches and reads the rest of their prompts.

        Raises:
            ValueError: the first time, if the model cannot be sampled from a shared cache.
        """
        self.slots.prove()
        live = {_reader(request): request for request in self.rows}
        sources: dict[DecodingRequest, tuple[Source, int]] = {}
        for request in requests:
            sources[request] = self._find_source(request, live)
            live[_reader(request)] = request
        # Neighbours that read about as much share a rectangle with little padding; neighbours of similar length attend
        # together in steps.
        packs, first = self.slots.packs, len(self.rows)
        reading = [request for request, (_, cached) in sources.items() if cached < request.position]
        reading.sort(key=lambda request: request.position - (0 if packs else sources[request][1]))
        self.rows += reading + [request for request, (_, cached) in sources.items() if cached >= request.position]
        self._sampler = None
        index = {request: row for row, request in enumerate(self.rows)}
        longest = max(request.position for request in requests)
        cache = self.slots.cache
        cache.reserve(max(len(self.rows), ROW_MULTIPLE), longest + ROW_MULTIPLE + 1)
        for request, (source, cached) in sources.items():
            if isinstance(source, RetainedRow):
                cache.attach_row(index[request], source, cached)
        pieces = []
        for row, request in enumerate(reading, start=first):
            cached = sources[request][1]
            pieces.append(Piece(row, cached, request.prompt_ids[cached:-1]))
        self.prefilled_tokens += read_prompts(self.slots, pieces, self._max_prefill_tokens)
        for request, (source, cached) in sources.items():
            if isinstance(source, DecodingRequest):
                cache.copy_row(index[source], index[request], cached)

    def _find_source(self, request: DecodingRequest, live: Mapping[Hashable, DecodingRequest]) -> tuple[Source, int]:
        """What holds the beginning of a prompt, and how many tokens of it are copied from there."""
        retained = self._retained.pop(request.session) if request.session is not None else None
        cached = retained.common_prefix(request.prompt_ids[:-1]) if retained else 0
        if retained and cached:
            request.read_at_once = retained.read_at_once if retained.read_at_once <= cached else 0
            return retained, cached
        request.read_at_once = request.position
        source, lasts = self._find_whole(request, live)
        if request.session is not None or not lasts:
            self._readers.note(request.prompt_ids[:-1], _reader(request))
        return source, 0 if source is None else request.position

    def _find_whole(self, request: DecodingRequest, live: Mapping[Hashable, DecodingRequest]) -> tuple[Source, bool]:
        """What holds all that a prompt reads, read in one go, and whether that outlasts its turn."""
        reader, count = self._readers.last(request.prompt_ids[:-1]), request.position
        source = live.get(reader) if reader is not None else None
        if source is not None and source.prompt_ids[:count] == request.prompt_ids[:-1]:
            return (source, source.session is not None) if source.read_at_once == count else (None, False)
        retained = self._retained.get(reader) if isinstance(reader, str) else None
        if retained is not None and retained.read_at_once == count == retained.common_prefix(request.prompt_ids[:-1]):
            return retained, True
        return None, False

    def step(self) -> list[DecodingRequest]:
        """Samples one token for every row. Rows that were cancelled leave; rows whose turn is over leave and are
        returned."""
        self._remove([row for row, request in enumerate(self.rows) if request.cancelled], retain=False)
        if not self.rows:
            return []
        self.steps += 1
        device, count = self.slots.device, len(self.rows)
        padding = [0] * max(0, ROW_MULTIPLE - count)
        token_ids = torch.tensor([r.next_token for r in self.rows] + padding, device=device).unsqueeze(1)
        positions = torch.tensor([r.position for r in self.rows] + padding, device=device).unsqueeze(1)
        lengths = [r.position + 1 for r in self.rows]
        self.slots.refuse_uncertain(max(lengths))
        self.slots.cache.reserve(len(token_ids), max(lengths))
        logits = self.slots.step(token_ids, positions, lengths)
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
                detached = self.slots.cache.detach_row(row, request.cached_ids(), request.read_at_once)
                self._retained.put(request.session, detached)
            last = self.rows.pop()
            if last is not request:
                self.rows[row] = last
                self.slots.cache.copy_row(len(self.rows), row, last.position)
            removed.append(request)
        if rows:
            self._sampler = None
        return removed[::-1]


def _reader(request: DecodingRequest) -> Hashable:
    """Under what a request's cache is found: its session's name outlasts the turn."""
    return request.session if request.session is not None else request
