"""
Batches in which there is something to share, and which fit: rows of a prompt together, and a budget of tokens.

Neither changes what is learned from a given set of rows. Keeping a prompt's rows together changes which rows share an
optimizer step. A token budget changes nothing but the memory: a batch that exceeds it is computed in parts, and each
part's loss weighs as many rows as it has.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .row import pack_rows
from .sequences import Sequences


class PromptGroupedSampler(Sampler[int]):
    """
    Every row once, in an order that is shuffled by prompt and within each prompt, with a prompt's rows together.

    The order depends on `seed` and the epoch alone, so that all processes and a resumed run agree on it.

    Args:
        prompts (`Sequence[Sequence[int]]`): token ids of each row's prompt.
        batch_size (`int`): rows of a batch. Where a prompt's rows would straddle the end of a batch, a prompt that
            fits the rest of the batch exactly comes first, if there is one; the order is otherwise random.
        seed (`int`, *optional*, defaults to `0`)
    """

    def __init__(self, prompts: Sequence[Sequence[int]], batch_size: int, seed: int = 0) -> None:
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            groups[tuple(prompt)].append(row)
        self._groups = list(groups.values())
        self._rows = len(prompts)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; accelerate calls this."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self._seed}-{self._epoch}")
        # By size, to find one that fills a gap; each size in random order
        waiting: dict[int, list[list[int]]] = defaultdict(list)
        order = [rng.sample(group, len(group)) for group in self._groups]
        rng.shuffle(order)
        for group in order:
            waiting[len(group)].append(group)
        taken: set[int] = set()
        position = 0
        for group in order:
            if id(group) in taken:
                continue
            gap = -position % self._batch_size
            while 0 < gap < len(group):
                filler = self._take(waiting.get(gap, []), taken)
                if filler is None:
                    break
                yield from filler
                position += len(filler)
                gap = -position % self._batch_size
            if id(group) not in taken:
                taken.add(id(group))
                yield from group
                position += len(group)

    @staticmethod
    def _take(groups: list[list[int]], taken: set[int]) -> list[int] | None:
        while groups:
            group = groups.pop()
            if id(group) not in taken:
                taken.add(id(group))
                return group
        return None


def split_batch(
    batch: dict[str, Any], max_tokens: int, sides: int, parts: int | None = None, packed: bool = True
) -> list[dict[str, Any]]:
    """
    Cut a batch into parts of at most `max_tokens` tokens each, prompts kept together.

    Args:
        batch (`dict[str, Any]`): tensors of `sides * B` or of `B` rows; with two sides, all first sides come first.
        max_tokens (`int`): tokens that the network reads of a part: unique ones where it is packed, padding included
            where it is not. A single example may exceed it.
        sides (`int`): sequences of an example in `input_ids`: 2 for a pair, 1 for a trajectory.
        parts (`int`, *optional*): exactly so many parts, at most one for each example, whatever they hold: for
            processes that must take the same number of steps.
        packed (`bool`, *optional*, defaults to `True`): whether the parts will be packed.
    """
    count = _unique_tokens if packed else _padded_tokens
    ids, mask, parents = batch["input_ids"], batch["attention_mask"], batch.get("token_parents")
    examples = len(ids) // sides
    lengths = mask.sum(dim=1).tolist()
    # Neighbours share most where they are packed, and pad least where they are not
    order = sorted(
        range(examples),
        key=lambda i: (
            ids[i, : lengths[i]].tolist() if packed else max(lengths[i + s * examples] for s in range(sides))
        ),
    )
    groups: list[list[int]] = []
    for i in order:
        rows = [each + side * examples for side in range(sides) for each in ([*groups[-1], i] if groups else [])]
        if groups and count(*_read(ids[rows], mask[rows], parents, rows)) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    while parts is not None and len(groups) < min(parts, examples):
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    while parts is not None and len(groups) > parts:
        groups.sort(key=len, reverse=True)
        groups.append(groups.pop() + groups.pop())
    if len(groups) == 1:
        return [batch]
    return [_select(batch, group, examples, sides) for group in groups]


def _read(ids: Tensor, mask: Tensor, parents: Tensor | None, rows: list[int]) -> tuple[Tensor, Tensor]:
    """What a model reads of these rows: their segments, where they branch."""
    if parents is None:
        return ids, mask
    sequences = Sequences(ids, mask, parents[rows])
    return sequences.input_ids, sequences.attention_mask


def _unique_tokens(ids: Tensor, mask: Tensor) -> int:
    return len(pack_rows(ids, mask))


def _padded_tokens(ids: Tensor, mask: Tensor) -> int:
    return len(ids) * int(mask.sum(dim=1).max())


def _select(batch: dict[str, Any], chosen: list[int], examples: int, sides: int) -> dict[str, Any]:
    """The examples `chosen` of a batch, without the columns that pad them all."""
    one = torch.tensor(chosen, device=batch["input_ids"].device)
    several = torch.cat([one + side * examples for side in range(sides)])
    width = batch["input_ids"].shape[1]
    used = int(batch["attention_mask"][several].sum(dim=1).max())
    part = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and len(value) in (examples, sides * examples):
            value = value[several if len(value) == sides * examples else one]
            if value.dim() == 2 and value.shape[1] == width:
                value = value[:, :used]
        part[name] = value
    return part
