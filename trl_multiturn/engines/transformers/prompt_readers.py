"""Who read a prompt last: what was computed for it can be copied as long as it is kept."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence


MAX_PROMPTS = 4096


class PromptReaders:
    """The last reader of each prompt; the oldest are forgotten. Whether it still keeps what it read, others know."""

    def __init__(self) -> None:
        self._readers: OrderedDict[bytes, Hashable] = OrderedDict()

    def note(self, token_ids: Sequence[int], reader: Hashable) -> None:
        key = _key(token_ids)
        self._readers[key] = reader
        self._readers.move_to_end(key)
        if len(self._readers) > MAX_PROMPTS:
            self._readers.popitem(last=False)

    def last(self, token_ids: Sequence[int]) -> Hashable | None:
        return self._readers.get(_key(token_ids))

    def clear(self) -> None:
        self._readers.clear()


def _key(token_ids: Sequence[int]) -> bytes:
    return array("q", token_ids).tobytes()
