"""Types: what a user's checker says of right and wrong uses, and which of our own modules pass it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import trl_multiturn
from tests.test_package import LAZY, lazy_names


pytest.importorskip("mypy", reason="the type checker is in the extra `dev`")
pytestmark = pytest.mark.slow

ROOT = Path(trl_multiturn.__file__).parents[1]
SCRIPT = Path(__file__).parent / "user_script.py"
PUBLIC = {home for package in LAZY for home in lazy_names(package).values()}

# Errors that are left, by module; a number here may fall and never rise, and what is not here has none
LEFT: dict[str, int] = {
    "trl_multiturn.data.value_rows": 1,
    "trl_multiturn.distributed.main_process": 1,
    "trl_multiturn.distributed.sharding": 3,
    "trl_multiturn.engines.transformers.compatibility": 1,
    "trl_multiturn.engines.transformers.decoding": 5,
    "trl_multiturn.engines.transformers.kv_cache": 5,
    "trl_multiturn.engines.transformers.stop_strings": 2,
    "trl_multiturn.losses.oreo": 1,
    "trl_multiturn.online.endings": 1,
    "trl_multiturn.packing.scored_head": 5,
    "trl_multiturn.sandbox.forked": 4,
    "trl_multiturn.sandbox.inside.child": 9,
    "trl_multiturn.sandbox.inside.confinement": 4,
    "trl_multiturn.sandbox.inside.kernel": 2,
    "trl_multiturn.sandbox.inside.preload": 1,
    "trl_multiturn.sandbox.inside.start": 3,
    "trl_multiturn.sandbox.inside.zygote": 7,
    "trl_multiturn.sandbox.jupyter": 18,
    "trl_multiturn.scripts.online": 1,
    "trl_multiturn.steps": 1,
    "trl_multiturn.templates.rendering": 2,
    "trl_multiturn.trainer.loop.checkpoints": 3,
    "trl_multiturn.trainer.loop.iterative": 3,
    "trl_multiturn.trainer.loop.policy_weights": 2,
    "trl_multiturn.verify._math_worker": 2,
    "trl_multiturn.verify.workers": 5,
}


def mypy(*arguments: str | Path) -> list[tuple[str, int, str]]:
    """`(file, line, code)` of each error that mypy reports."""
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *map(str, arguments)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    found = re.findall(r"^(\S+?):(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE)
    return [(file, int(line), code) for file, line, code in found]


@pytest.fixture(scope="module")
def errors() -> list[tuple[str, int, str]]:
    return mypy("trl_multiturn", SCRIPT)


def test_a_users_script_is_told_what_is_wrong_and_nothing_else(errors):
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    wrong = {(n, m[1]) for n, line in enumerate(lines, 1) if (m := re.search(r"# wrong: ([\w-]+)", line))}
    assert {(line, code) for file, line, code in errors if file.endswith(SCRIPT.name)} == wrong


def test_modules_with_public_names_have_no_error(errors):
    public = {name.replace(".", "/") + ".py" for name in PUBLIC}
    assert [error for error in errors if error[0] in public] == []


def test_elsewhere_errors_only_become_fewer(errors):
    counts = Counter(file.removesuffix(".py").replace("/", ".") for file, _, _ in errors if SCRIPT.name not in file)
    assert {module: count for module, count in counts.items() if count > LEFT.get(module, 0)} == {}
