"""Key-value caches: one row per live request in a shared buffer, and a bounded store for trajectories that wait."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


LENGTH_MULTIPLE = 64
LENGTH_HEADROOM = 512


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class RetainedRow:
    """The cache of one trajectory, detached from the batch.

    Attributes:
        token_ids (`list[int]`): the tokens whose keys and values are held.
        states (`list[torch.Tensor]`): keys and values, layer by layer, each `(len(token_ids), H, D)`.
        read_at_once (`int`): how many of the tokens were read as one prompt, from the first on.
    """

    token_ids: list[int]
    states: list[torch.Tensor]
    read_at_once: int = 0

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    def common_prefix(self, prompt_ids: list[int]) -> int:
        """How many leading tokens of `prompt_ids` are held."""
        limit = min(len(self.token_ids), len(prompt_ids))
        if self.token_ids[:limit] == prompt_ids[:limit]:
            return limit
        return next(i for i in range(limit) if self.token_ids[i] != prompt_ids[i])


class RetainedCaches:
    """Caches of trajectories between their turns, by session; the least recently used go first. Safe to call from
    several threads.

    Args:
        limit_bytes (`int`):
            Most bytes held. A row that alone is larger is not kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.evictions = 0
        self._rows: OrderedDict[str, RetainedRow] = OrderedDict()
        self._holders: Counter[int] = Counter()  # sessions of each row, by its id: forks share one
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, session: str | None) -> bool:
        return session in self._rows

    def get(self, session: str) -> RetainedRow | None:
        return self._rows.get(session)

    def put(self, session: str, row: RetainedRow) -> None:
        with self._lock:
            self.pop(session)
            self._rows[session] = row
            self._holders[id(row)] += 1
            if self._holders[id(row)] == 1:
                self.nbytes += row.nbytes
            while self.nbytes > self.limit_bytes:
                self.pop(next(iter(self._rows)))
                self.evictions += 1

    def pop(self, session: str) -> RetainedRow | None:
        with self._lock:
            row = self._rows.pop(session, None)
            if row is not None:
                self._holders[id(row)] -= 1
                if not self._holders[id(row)]:
                    del self._holders[id(row)]
                    self.nbytes -= row.nbytes
            return row

    def fork(self, session: str, new_session: str) -> None:
        """Lets another session go on from what `session` holds, which is not copied; nothing if it holds nothing."""
        with self._lock:
            if session in self._rows:
                self.put(new_session, self._rows[session])

    def clear(self) -> None:
        with self._lock:
            self._rows.clear()
            self._holders.clear()
            self.nbytes = 0


class CacheFilledError(Exception):
    """Ends a pass that only fills the cache, behind the last layer's keys and values: nothing more is needed of it."""


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, `(R, C, H, D)`: row r holds its request's tokens in columns 0, 1, …

    Rows are left-aligned, so that a token's column is its position; what lies behind a row's last token is masked by
    the caller and stays finite, as the buffer starts as zeros.
    """

    is_sliding = False

    def __init__(self, window: SlotWindow, last: bool) -> None:
        super().__init__()
        self._window, self._last = window, last

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = self._allocate(key_states)
        self.values = self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, states: torch.Tensor) -> torch.Tensor:
        heads, head_dim = states.shape[1], states.shape[3]
        return states.new_zeros(self._window.rows, self._window.length, heads, head_dim)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `(N, H, Q, D)` states at the window's cells and returns its live rows, `(L, H, K, D)`.

        Raises:
            CacheFilledError: in the last layer of a pass that only fills the cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        written = self._write(self.keys, key_states), self._write(self.values, value_states)
        if self._last and self._window.only_fills:
            raise CacheFilledError
        return written

    def _write(self, buffer: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        window = self._window
        flat, cells = buffer.view(-1, *buffer.shape[2:]), window.cells.to(buffer.device)
        written = states.transpose(1, 2).reshape(-1, *buffer.shape[2:])[: len(cells)]
        flat.index_copy_(0, cells, written.to(buffer.dtype))
        return buffer[window.first : window.first + window.live, : window.visible].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._window.visible, 0

    def get_seq_length(self) -> int:
        return self._window.visible

    def get_max_length(self) -> int:
        return -1


@dataclass
class SlotWindow:
    """What the next forward pass reads and writes; shared by all layers.

    Attributes:
        rows, length (`int`): size of the buffer, R and C.
        first (`int`): the first row of this pass.
        live (`int`): rows whose keys and values attention gets, L; rows behind them are padding.
        visible (`int`): columns that attention sees, K.
        cells (`torch.Tensor`): flat indices (row · C + column) to write, one per token of the pass; tokens beyond
            them are padding.
        only_fills (`bool`): the pass ends when the last layer is written.
    """

    rows: int = 0
    length: int = 0
    first: int = 0
    live: int = 0
    visible: int = 0
    cells: torch.Tensor | None = None
    only_fills: bool = False


class SlotCache(Cache):
    """The cache of a whole batch, to whose rows requests come and go.

    Args:
        num_layers (`int`):
            Layers of the model.
        max_rows (`int`):
            Most rows that will be asked for.
    """

    def __init__(self, num_layers: int, max_rows: int) -> None:
        self.window = SlotWindow()
        self._max_rows = max_rows
        super().__init__(layers=[SlotLayer(self.window, index == num_layers - 1) for index in range(num_layers)])

    def buffers(self) -> list[tuple[CacheLayerMixin, str]]:
        return [(layer, name) for layer in self.layers if layer.is_initialized for name in ("keys", "values")]

    def tensors(self) -> list[torch.Tensor]:
        return [getattr(layer, name) for layer, name in self.buffers()]

    def reserve(self, rows: int, length: int) -> None:
        """Grows the buffer to at least `rows` rows of `length` columns; what is in it stays."""
        window = self.window
        if rows <= window.rows and length <= window.length:
            return
        # With room to spare, as every growth copies the buffer.
        if length > window.length:
            window.length = round_up(length + min(length, LENGTH_HEADROOM), LENGTH_MULTIPLE)
        if rows > window.rows:
            window.rows = min(self._max_rows, max(rows, 2 * window.rows))
        for layer, name in self.buffers():
            old = getattr(layer, name)
            new = old.new_zeros(window.rows, window.length, *old.shape[2:])
            new[: old.shape[0], : old.shape[1]] = old
            setattr(layer, name, new)

    def focus(self, first: int, live: int, columns: torch.Tensor, visible: int) -> None:
        """Aims the next forward pass at the rows from `first` on, of which the first `live` are read by attention;
        token (n, q) of `columns`, `(N, Q)`, is written to row `first + n`, column `columns[n, q]`."""
        window = self.window
        window.first, window.live, window.visible, window.only_fills = first, live, visible, False
        rows = torch.arange(first, first + len(columns), device=columns.device).unsqueeze(1)
        window.cells = (rows * window.length + columns).flatten()

    def focus_on_tokens(self, rows: torch.Tensor, columns: torch.Tensor) -> None:
        """Aims the next forward pass at single tokens, `(T,)`, anywhere in the buffer, all of whose rows attention
        gets; the pass ends as soon as they are written."""
        window = self.window
        window.first, window.live, window.visible, window.only_fills = 0, window.rows, window.length, True
        window.cells = rows * window.length + columns

    def copy_row(self, source: int, target: int, length: int) -> None:
        for buffer in self.tensors():
            buffer[target, :length] = buffer[source, :length]

    def detach_row(self, row: int, token_ids: list[int], read_at_once: int) -> RetainedRow:
        """A copy of a row that holds `token_ids`."""
        states = [buffer[row, : len(token_ids)].clone() for buffer in self.tensors()]
        return RetainedRow(token_ids, states, read_at_once)

    def attach_row(self, row: int, retained: RetainedRow, length: int) -> None:
        """Fills a row with the first `length` tokens of a retained one."""
        if not self.buffers():
            for index, layer in enumerate(self.layers):
                keys, values = retained.states[2 * index : 2 * index + 2]
                layer.lazy_initialization(keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0))
        for buffer, states in zip(self.tensors(), retained.states, strict=True):
            buffer[row, :length] = states[:length]
