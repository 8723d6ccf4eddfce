"""Names of a package that load on first use, so that importing it stays quick and loads nothing it need not."""

from __future__ import annotations

import importlib


TYPE_CHECKING = False  # see the package's `__init__`
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any


def attach(
    package: str, modules: Mapping[str, Sequence[str]], present: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    Makes the `__getattr__`, `__dir__` and `__all__` of a package whose names load on first use.

    Type checkers cannot follow it. The package therefore imports the same names under `if TYPE_CHECKING:`, and a test
    compares the two lists.

    Args:
        package (`str`):
            The package's `__name__`.
        modules (`Mapping[str, Sequence[str]]`):
            Module, relative to the package (`".loop"`, `"..engines.engine"`), to the names that it defines.
        present (`Sequence[str]`, *optional*):
            Public names that the package holds already.

    Returns:
        `tuple`: `__getattr__`, `__dir__` and `__all__`.
    """
    homes = {name: module for module, names in modules.items() for name in names}
    public = sorted([*homes, *present])

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name], package), name)

    return load, lambda: public, public


def load_path(path: str) -> Any:
    """What a dotted path names, such as `"my_package.my_module.my_function"`.

    Raises:
        `ValueError`: saying why it could not be loaded.
    """
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ValueError("it is no dotted path")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(str(error)) from error
