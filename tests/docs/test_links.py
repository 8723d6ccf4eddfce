"""Links between files of the repository lead somewhere; those inside the site the site's build checks once more."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import nbformat
import pytest

from .pages import PAGES, ROOT


FILES = [
    *PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "benchmarks/results").glob("*.md")),
    *sorted((ROOT / "examples/notebooks").glob("*.ipynb")),
]
_CODE = re.compile(r"^(`{3,})[^`\n]*\n.*?^\1$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
# Made when the site is built
GENERATED = ("docs/messages.md",)


@lru_cache(None)
def text_of(path: Path) -> str:
    """The Markdown of a file, without code."""
    text = path.read_text("utf-8")
    if path.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return _CODE.sub(lambda code: "" if code[1] else code[0], text)


@lru_cache(None)
def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings and of the objects that the reference documents on it."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    plain = [unicodedata.normalize("NFKD", re.sub(r"[^\w\s-]", "", heading)) for heading in headings]
    ids = {re.sub(r"[-\s]+", "-", heading.strip().lower()) for heading in plain}
    return ids | set(re.findall(r"^::: (\S+)", text_of(path), re.MULTILINE))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_each_link_into_the_repository_leads_to_a_file_and_to_a_heading_of_it(path):
    lost = []
    for link in _LINK.findall(text_of(path)):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if "://" in link or link.startswith("mailto:") or target.relative_to(ROOT).as_posix() in GENERATED:
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            lost.append(link)
    assert lost == []
