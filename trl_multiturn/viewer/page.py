"""A payload as one page of HTML that opens from disk, and back."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import lru_cache
from importlib.resources import files

from ..messages.terminal import visible
from .payload import Payload


# In the order in which they are read
_SCRIPTS = (
    "dom", "text", "data", "query", "badges", "rows", "tokens", "trajectory", "pairs", "prompts", "charts",
    "overview", "lists", "app",
)  # fmt: skip
_FIRST = ("index", "vocabulary")  # before the script: the page draws as soon as these are there
_BLOCK = re.compile(r'<script type="text/plain" id="block-([\w-]+)">([A-Za-z0-9+/=]*)</script>')


def render_page(payload: Payload, title: str) -> str:
    """
    The page: everything it needs is in it, and its policy lets it load and run nothing else.

    Args:
        payload ([`Payload`]):
            What it shows.
        title (`str`):
            Escaped here.
    """
    page = files(__package__).joinpath("page")
    style, script = page.joinpath("style.css").read_text("utf-8"), page_script()
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "policy": policy,
        "title": html.escape(visible(title)),
        "style": style,
        "script": script,
        "index": "\n".join(_block(name, payload.blocks[name]) for name in _FIRST),
        "blocks": "\n".join(_block(name, block) for name, block in payload.blocks.items() if name not in _FIRST),
    }
    template = page.joinpath("page.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # in one pass: a title may hold braces


@lru_cache
def page_script() -> str:
    """The page's own script."""
    page = files(__package__).joinpath("page")
    sources = [page.joinpath(f"{name}.js").read_text("utf-8") for name in _SCRIPTS]
    return '"use strict";\n\n' + "\n".join(sources)


def read_page(text: str) -> Payload:
    """
    The payload of a page.

    Raises:
        `ValueError`: if the text is no such page.
    """
    blocks = {name: base64.b64decode(block) for name, block in _BLOCK.findall(text)}
    if "index" not in blocks:
        raise ValueError("This is no page that `trl-multiturn view` wrote: it has no block `index`.")
    return Payload(blocks)


def _block(name: str, content: bytes) -> str:
    return f'<script type="text/plain" id="block-{name}">{base64.b64encode(content).decode("ascii")}</script>'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
