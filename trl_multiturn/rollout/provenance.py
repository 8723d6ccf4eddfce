"""Where a trajectory comes from: seeds derived from its place, and hashes of what produced it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

from ..tools.base import tool_version
from ..tools.environment_pool import EnvironmentPool


class WatchedRow(Mapping[str, Any]):
    """A row of the prompts that knows whether a tool has looked at it.

    If none has, what the row says beside the prompt has no part in the rollout, and may be corrected later.
    """

    def __init__(self, row: Mapping[str, Any]):
        self._row = row
        self.was_read = False

    def __getitem__(self, name: str) -> Any:
        self.was_read = True
        return self._row[name]

    def __iter__(self) -> Iterator[str]:
        self.was_read = True
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def __repr__(self) -> str:
        self.was_read = True
        return repr(self._row)


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on the parts alone, not on what else runs or ran before.

    ```python
    >>> seed = derive_seed(config.seed, iteration, "current", prompt_index, sample_index)
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
    """What identifies a reward function's or a factory's behavior, as JSON values: its `version`, or a hash of its
    source; of a `partial`, with a hash of its arguments, which may be large or secret and are therefore not stored."""
    if isinstance(function, functools.partial):
        arguments = [[_identity(value) for value in function.args]]
        arguments += [[name, _identity(value)] for name, value in sorted(function.keywords.items())]
        return f"{version_of(function.func)}, arguments:{fingerprint(arguments)}"
    if isinstance(function, EnvironmentPool):  # how environments are kept decides nothing
        return version_of(function.factory)
    if isinstance(function, Mapping):
        return {str(name): version_of(each) for name, each in function.items()}
    return tool_version(function)


_NOT_DECISIVE = ("verifiers", "versions", "policy_iteration", "policy_lag")


def decides_rollouts(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a rollout's provenance decides which trajectories come out.

    How they were judged does not; that is kept with each verdict. Nor does the age of the policy, whose weights are
    named. Of versions the first two numbers count, so that a patch release goes on with what is there.
    """
    decisive = {name: value for name, value in provenance.items() if name not in _NOT_DECISIVE}
    decisive["version"] = _release_line(provenance["versions"]["trl_multiturn"])
    decisive["engine"] = {
        name: _release_line(value) if name.endswith("_version") else value
        for name, value in provenance["engine"].items()
    }
    decisive["tools"] = tools_without_patch(provenance["tools"])
    return decisive


def tools_without_patch(tools: Mapping[str, str]) -> dict[str, str]:
    """Versions of tools, where that of this package's interpreter is without its patch number."""
    return {name: re.sub(r"^(python-\d+\.\d+)[^-]*", r"\1", str(version)) for name, version in tools.items()}


def _release_line(version: Any) -> str:
    return ".".join(str(version).split("+")[0].split(".")[:2])


def behavior_of(function: Any) -> Any:
    """[`version_of`] a function, with the code and the constants of the same package that it uses.

    A reward function is often repaired in a function that it calls. One with a `version` is taken at its word.
    """
    seen: dict[str, str] = {}
    _collect_used(function, seen)
    version = version_of(function)
    return f"{version}, uses:{fingerprint(seen)}" if seen else version


def _collect_used(function: Any, seen: dict[str, str]) -> None:
    while isinstance(function, functools.partial):
        function = function.func
    if getattr(function, "version", None) is not None:
        return
    function = getattr(function, "__func__", function)
    functions = [function] if inspect.isfunction(function) else _methods(function)
    for each in functions:
        package = (each.__module__ or "").partition(".")[0]
        for name, value in _names_used(each).items():
            key = f"{each.__module__}.{each.__qualname__}:{name}"
            if key in seen or inspect.ismodule(value):
                continue
            if inspect.isroutine(value) or inspect.isclass(value):
                if (getattr(value, "__module__", None) or "").partition(".")[0] == package:
                    seen[key] = tool_version(value)
                    _collect_used(value, seen)
            elif (constant := _constant(value)) is not None:
                seen[key] = constant


def _names_used(function: types.FunctionType) -> dict[str, Any]:
    """Globals and enclosing variables that a function's code names, that of comprehensions and inner functions too."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= {*code.co_names, *code.co_freevars}
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    used = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            used[name] = cell.cell_contents
    return used


def _methods(thing: Any) -> list[Any]:
    kind = thing if inspect.isclass(thing) else type(thing)
    return [method for _, method in inspect.getmembers(kind, inspect.isfunction)]


def _constant(value: Any) -> str | None:
    """A number, text, pattern or collection of them; what else a function holds may change while it works."""
    if isinstance(value, re.Pattern):
        return f"{value.pattern!r}, {value.flags}"
    try:
        return fingerprint(json.loads(json.dumps(value)))
    except (TypeError, ValueError, RecursionError):
        return None


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
