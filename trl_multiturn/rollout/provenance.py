"""Where a trajectory comes from: seeds derived from its place, and hashes of what produced it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from ..tools.base import tool_version


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on the parts alone, not on what else runs or ran before.

    ```python
    >>> derive_seed(config.seed, iteration, "current", prompt_index, sample_index)
    ```
    """
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 1


def fingerprint(value: Any) -> str:
    """A short hash of a JSON value; whatever else it holds counts as its text, without addresses in memory."""

    def as_text(other: Any) -> str:
        return re.sub(r" at 0x[0-9a-f]+", "", str(other))

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=as_text)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def version_of(function: Any) -> Any:
    """What identifies a reward function's or a factory's behaviour, as JSON values: its `version`, or a hash of its
    source; of a `partial`, with a hash of its arguments, which may be large or secret and are told nobody."""
    if isinstance(function, functools.partial):
        arguments = [[_identity(value) for value in function.args]]
        arguments += [[name, _identity(value)] for name, value in sorted(function.keywords.items())]
        return f"{version_of(function.func)}, arguments:{fingerprint(arguments)}"
    if isinstance(function, Mapping):
        return {str(name): version_of(each) for name, each in function.items()}
    return tool_version(function)


def _identity(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=tool_version)
    except (TypeError, ValueError):  # keys that JSON does not know, or a circle
        return tool_version(value)


def describe_tokenizer(processing_class: Any) -> dict[str, str]:
    """Hashes of the vocabulary and of the chat template."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "tokenizer": fingerprint([tokenizer.get_vocab(), special]),
        "chat_template": fingerprint(processing_class.chat_template),
    }
