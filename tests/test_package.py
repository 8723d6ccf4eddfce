"""The package as a whole: every module imports, imports go one way, and `__all__` is what there is."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trl_multiturn


ROOT = Path(trl_multiturn.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(ROOT)], "trl_multiturn."))

# What each part may import of the others. Anything missing here may import nothing but itself.
LAYERS = {
    "trajectory": set(),
    "version": set(),
    "durable": set(),
    "_upstream": set(),
    "losses": set(),
    "steps": set(),
    "report": {"durable"},
    "templates": {"_upstream"},
    "tools": {"trajectory", "version"},
    "verify": {"trajectory", "steps", "version"},
    "precision": set(),
    "packing": {"_upstream", "precision"},
    "modeling": {"_upstream"},
    "data": {"trajectory", "templates", "steps", "_upstream", "version", "verify", "durable"},
    "rollout": {"trajectory", "templates", "steps", "_upstream", "version", "tools", "verify", "precision", "durable"},
    "trainer": {"data", "losses", "modeling", "packing", "templates", "_upstream", "trajectory", "durable"},
}
TOP = set(LAYERS)


def imports_of(module: str) -> set[str]:
    """Parts of the package that a module imports, at any depth of its source."""
    spec = importlib.util.find_spec(module)
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    parts = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else node.module
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("trl_multiturn.")}
    return parts & {name.split(".")[1] for name in MODULES}


@pytest.mark.parametrize("module", [m for m in MODULES if not m.rpartition(".")[2].startswith("_")])
def test_module_imports(module):
    try:
        importlib.import_module(module)
    except ImportError as error:  # an engine that is an extra says which one
        assert module == "trl_multiturn.rollout.vllm_engine" and "vllm" in str(error)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    part = module.split(".")[1]
    if part in LAYERS:
        assert imports_of(module) <= LAYERS[part] | {part}


def test_offline_training_loads_no_interpreter_no_engine_and_no_verifier():
    code = (
        "import sys\n"
        "from trl_multiturn import DQOTrainer, MultiTurnDPOTrainer, MultiTurnKTOTrainer, OREOTrainer\n"
        "loaded = {name.split('.')[1] for name in sys.modules if name.startswith('trl_multiturn.')}\n"
        "print(sorted(loaded & {'rollout', 'tools', 'verify', 'callbacks', 'iteration'}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_all_is_what_there_is():
    assert list(trl_multiturn.__all__) == sorted(set(trl_multiturn.__all__))
    for name in trl_multiturn.__all__:
        assert getattr(trl_multiturn, name) is not None
    assert dir(trl_multiturn) == trl_multiturn.__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        trl_multiturn.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", sorted(set(trl_multiturn.__all__) - {"__version__"}))
def test_public_names_are_documented(name):
    assert (getattr(trl_multiturn, name).__doc__ or "").strip()
