"""See a run: what was rolled out, judged and trained on, as one page of HTML. Only the commands import it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from .page import read_page as read_page
    from .payload import Payload as Payload
    from .viewing import View as View, view as view
else:
    __getattr__, __dir__, __all__ = attach(
        __name__, {".page": ["read_page"], ".payload": ["Payload"], ".viewing": ["View", "view"]}
    )
