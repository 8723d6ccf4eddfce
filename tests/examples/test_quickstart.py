"""The notebook, executed from top to bottom as a reader would."""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from trl_multiturn.viewer import read_page


EXAMPLES = Path(__file__).parents[2] / "examples"


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    shutil.copytree(EXAMPLES / "embedded", tmp_path / "embedded")  # it writes into its own folder: run a copy
    (tmp_path / "notebooks").mkdir()
    notebook = nbformat.read(EXAMPLES / "notebooks" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    client = NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path / "notebooks")}})
    client.execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pages = [output["data"]["text/html"] for cell in code for output in cell.outputs if "data" in output]
    preview = next(page for page in pages if "trained" in page)
    assert "```python" in preview and "font-weight:600" in preview
    offline = next(text_of(cell) for cell in code if "pass@1 on the same problems" in text_of(cell))
    before, after = re.search(r"problems: ([\d.]+) .*before, ([\d.]+) ", offline).groups()  # in percent
    assert float(after) > float(before)
    trajectories, correct, pairs = map(
        int, re.search(r"(\d+) trajectories, (\d+) correct, (\d+) pairs", text_of(code[-2])).groups()
    )
    assert 0 < pairs <= correct < trajectories
    cell = code[-1].outputs[0]["data"]["text/html"]
    index = read_page(html.unescape(re.search('srcdoc="([^"]*)"', cell)[1]))["index"]
    assert (index["count"], len(index["pairs"]["chosen"]), index["kind"]) == (trajectories, pairs, "run")
    assert list((tmp_path / "notebooks" / "outputs" / "quickstart" / "rollouts").glob("iteration_000/journal"))
