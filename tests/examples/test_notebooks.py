"""The notebooks run, what they show is stored in them, and it shows a success."""

from __future__ import annotations

import html
import re

import pytest

from trl_multiturn.viewer import read_page

from . import notebooks


SIDES = ("chosen", "rejected")
FILES = pytest.mark.parametrize("file", notebooks.FILES, ids=lambda file: file.stem)


@FILES
def test_outputs_are_stored_without_a_trace_of_the_machine(file):
    text = file.read_text("utf-8")
    assert not re.search(r"[\"' (=](/[a-z]\w*/|[A-Z]:\\)", re.sub(r"</\w+>", "", text))
    assert '"stderr"' not in text and '"traceback"' not in text
    cells = notebooks.code_cells(notebooks.read(file))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@FILES
def test_what_is_stored_is_what_the_code_prints(file):
    for cell in notebooks.code_cells(notebooks.read(file)):
        assert [words for words in notebooks.printed_words(cell) if words not in notebooks.text_of(cell)] == []


@FILES
def test_a_success_is_shown(file):
    compared = [cell for cell in notebooks.code_cells(notebooks.read(file)) if " before, " in notebooks.text_of(cell)]
    assert compared
    for cell in compared:
        before, after = notebooks.shares(cell)
        assert after > before


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in notebooks.ENVIRONMENT.items():
            patch.setenv(name, value)
        return notebooks.execute(folder)


@pytest.mark.slow
@FILES
def test_a_run_shows_what_is_stored(executed, file):
    """In kind: digits differ between processors."""
    stored = notebooks.code_cells(notebooks.read(file))
    run = notebooks.code_cells(notebooks.cleaned(executed[file.stem]))
    for old, new in zip(stored, run, strict=True):
        assert notebooks.kinds_of(old) == notebooks.kinds_of(new)
        assert [words for words in notebooks.printed_words(new) if words not in notebooks.text_of(new)] == []
        if " before, " in notebooks.text_of(new):
            before, after = notebooks.shares(new)
            assert after > before


def page_of(cell) -> str:
    """What a cell shows as HTML."""
    return "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)


@pytest.mark.slow
def test_the_quick_start_shows_masks_rows_and_the_whole_run(executed):
    masks, _, online, viewer = notebooks.code_cells(executed["quickstart"])[-4:]
    assert "```python" in page_of(masks) and "font-weight:600" in page_of(masks) and "trained" in page_of(masks)
    text = notebooks.text_of(online)
    counts = map(int, re.search(r"(\d+) trajectories, (\d+) correct, (\d+) pairs", text).groups())
    trajectories, correct, pairs = counts
    assert 0 < pairs <= correct < trajectories
    index = read_page(html.unescape(re.search('srcdoc="([^"]*)"', page_of(viewer))[1]))["index"]
    assert (index["count"], len(index["pairs"]["chosen"]), index["kind"]) == (trajectories, pairs, "run")


@pytest.mark.slow
def test_values_learn_to_tell_right_trajectories_from_wrong_ones(executed):
    text = "".join(map(notebooks.text_of, notebooks.code_cells(executed["offline_values_oreo"])))
    right, wrong = (list(map(float, re.findall(rf"'value/final_{side}': '(.*?)'", text))) for side in SIDES)
    assert right[-1] - wrong[-1] > right[0] - wrong[0]
