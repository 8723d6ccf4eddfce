"""TRL's own tests of DPO and KTO, with this package's trainers in the place of TRL's.

Copies the tests of a TRL checkout, swaps in one copy the classes that the two test modules import, runs both copies
one after the other, and lists every test that comes out otherwise.

    git clone --depth 1 --branch v1.16.0 https://github.com/huggingface/trl
    python benchmarks/trl_tests.py --trl-source trl [--output benchmarks/results/trl_tests.md]

The tests load models and datasets from the Hugging Face Hub. Where it cannot be reached, `--hub DIR` names a folder
with local ones under the same names (`DIR/trl-internal-testing/…`). Tests of what is neither here nor there fail in
both copies, and are counted as not loaded.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import torch
import transformers
import trl


SWAPS = {
    "test_dpo_trainer.py": (
        "from trl import DPOConfig, DPOTrainer",
        "from trl_multiturn import MultiTurnDPOConfig as DPOConfig, MultiTurnDPOTrainer as DPOTrainer",
    ),
    "test_kto_trainer.py": (
        "from trl import KTOConfig, KTOTrainer",
        "from trl_multiturn import MultiTurnKTOConfig as KTOConfig, MultiTurnKTOTrainer as KTOTrainer",
    ),
}
NOT_LOADED = re.compile(
    r"OfflineModeIsEnabled|couldn't connect to|Couldn't reach|Cannot send a request|not a local folder"
)
OUTCOMES = ["passed", "failed", "not loaded", "skipped"]


def prepare(source: Path, folder: Path, hub: Path | None, swapped: bool) -> None:
    """A copy of TRL's tests that can be run from `folder`."""
    shutil.copytree(source / "tests", folder / "tests", dirs_exist_ok=True)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n    low_priority\n")
    if hub is not None and not (folder / "trl-internal-testing").exists():
        (folder / "trl-internal-testing").symlink_to((hub / "trl-internal-testing").resolve())
    for name, (theirs, ours) in SWAPS.items() if swapped else ():
        module = folder / "tests" / name
        text = module.read_text()
        if theirs not in text:
            raise SystemExit(
                f"{module} has no line `{theirs}`, so its classes cannot be swapped. Look at its imports."
            )
        module.write_text(text.replace(theirs, ours))


def run(folder: Path, expression: str | None) -> None:
    """Runs the two modules of a copy; the outcomes are in `results.xml`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=partial.xml"]
    command += [f"tests/{name}" for name in SWAPS] + (["-k", expression] if expression else [])
    with (folder / "log").open("w") as log:
        subprocess.run(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "COLUMNS": "120"})
    (folder / "partial.xml").replace(folder / "results.xml")


def outcomes(folder: Path) -> dict[str, str]:
    """The outcome of each test of a copy that was run."""
    found = {}
    for case in ElementTree.parse(folder / "results.xml").iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        fault = next((case.find(tag) for tag in ("failure", "error") if case.find(tag) is not None), None)
        if fault is not None:
            found[name] = "not loaded" if NOT_LOADED.search(fault.text or "") else "failed"
        else:
            found[name] = "passed" if case.find("skipped") is None else "skipped"
    return found


def table(stock: dict[str, str], ours: dict[str, str]) -> str:
    """Counts by module, and the tests that came out otherwise."""
    lines = ["| module | classes | " + " | ".join(OUTCOMES) + " |", "| --- | --- |" + " ---: |" * len(OUTCOMES)]
    for module in (name.removesuffix(".py") for name in SWAPS):
        for arm, found in (("TRL", stock), ("trl_multiturn", ours)):
            counts = Counter(outcome for name, outcome in found.items() if name.startswith(module))
            lines.append(f"| {module} | {arm} | " + " | ".join(str(counts[outcome]) for outcome in OUTCOMES) + " |")
    differing = [name for name in stock.keys() | ours.keys() if stock.get(name) != ours.get(name)]
    lines += ["", f"Tests that come out otherwise: {len(differing) or 'none'}.", ""]
    lines += [f"- `{name}`: {stock.get(name)}, {ours.get(name)}" for name in sorted(differing)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-source", type=Path, required=True, help="checkout of TRL")
    parser.add_argument("--hub", type=Path, help="folder with local models and datasets under their names on the Hub")
    parser.add_argument("--folder", type=Path, default=Path("trl_tests"), help="work folder; a copy run there is kept")
    parser.add_argument("-k", dest="expression", help="only the tests that match, as in pytest")
    parser.add_argument("--output", type=Path, help="file to write the table to")
    args = parser.parse_args()
    found = {}
    for arm in ("stock", "ours"):
        folder = args.folder / arm
        if not (folder / "results.xml").exists():
            prepare(args.trl_source, folder, args.hub, swapped=arm == "ours")
            run(folder, args.expression)
        found[arm] = outcomes(folder)
    text = (
        f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores ({platform.machine()}); Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, trl "
        f"{trl.__version__}.\n\n{table(found['stock'], found['ours'])}"
    )
    print(text)
    if args.output is not None:
        args.output.write_text(f"# TRL's own tests, with the classes swapped\n\n{text}")


if __name__ == "__main__":
    main()
