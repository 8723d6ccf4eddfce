"""
The notebooks, run from top to bottom as a reader would, and their stored outputs.

After a change of a notebook, or of what it shows:

```bash
python -m tests.examples.notebooks    # runs all and stores what they show
```
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook


EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
_COLORS = re.compile(r"\x1b\[[\d;]*m")


def read(file: Path) -> NotebookNode:
    return nbformat.read(file, as_version=4)


def execute(folder: Path) -> dict[str, NotebookNode]:
    """
    Every notebook with the outputs of a run, by its name.

    All run in one kernel, which forgets its variables in between, so that libraries are imported once. They run on a
    copy of the examples in `folder`, where they write.
    """
    shutil.copytree(EXAMPLES / "embedded", folder / "embedded")
    (folder / "notebooks").mkdir()
    notebooks = {file.stem: read(file) for file in FILES}
    whole = new_notebook()
    for notebook in notebooks.values():
        whole.cells += [*code_cells(notebook), new_code_cell("%reset -f")]
    resources = {"metadata": {"path": str(folder / "notebooks")}}
    NotebookClient(whole, timeout=500, resources=resources, record_timing=False).execute()
    return notebooks


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """A copy as it is stored: without progress bars and warnings, without paths of this machine, and without the
    viewer's pages, which are large and which no site shows."""
    notebook = deepcopy(notebook)
    for number, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = number
        cell.outputs = [_cleaned(output, number) for output in cell.outputs if output.get("name") != "stderr"]
        cell.outputs = _joined(cell.outputs)
    return notebook


def _cleaned(output: NotebookNode, number: int) -> NotebookNode:
    if output.output_type == "stream":
        output.text = _portable(output.text)
        return output
    output.metadata.clear()
    if output.output_type == "execute_result":
        output.execution_count = number
    data = output.get("data", {})
    if data.get("text/html", "").startswith("<iframe"):
        del data["text/html"]
    for kind in data:
        data[kind] = _portable(data[kind])
    return output


def _portable(text: str) -> str:
    return _COLORS.sub("", text).replace(f"{Path(sys.executable).parent}{os.sep}", "")


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def text_of(cell: NotebookNode) -> str:
    """What a cell prints."""
    return "".join(output.get("text", "") for output in cell.outputs)


def kinds_of(cell: NotebookNode) -> set[str]:
    """Of what kinds a cell's outputs are."""
    return {kind for output in cell.outputs for kind in output.get("data", {"printed": None})}


def printed_words(cell: NotebookNode) -> list[str]:
    """What the cell's own calls of `print` say whatever the numbers are: the fixed parts of their texts."""
    calls = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    shown = [argument for call in calls if ast.unparse(call.func) == "print" for argument in call.args]
    parts = [part for argument in shown for part in getattr(argument, "values", [argument])]
    return [str(part.value).strip() for part in parts if isinstance(part, ast.Constant)]


def shares(cell: NotebookNode) -> tuple[float, float]:
    """The two shares of right answers, before and after, that a cell prints, in percent."""
    before, after = re.search(r": ([\d.]+) .*before, ([\d.]+) .*after", text_of(cell)).groups()
    return float(before), float(after)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as directory:
        for name, executed in execute(Path(directory)).items():
            nbformat.write(cleaned(executed), EXAMPLES / "notebooks" / f"{name}.ipynb")
