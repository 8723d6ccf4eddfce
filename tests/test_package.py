"""The package as a whole: every module imports, imports go one way, and `__all__` is what there is."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trl_multiturn


ROOT = Path(trl_multiturn.__file__).parent
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(ROOT)], "trl_multiturn."))

# The wings, from the ground floor up, and what each may import of the others beside itself
GROUND = {"_lazy", "_upstream", "concurrency", "errors", "messages", "precision"}
GROUND |= {"segments", "steps", "trajectory", "version"}
LAYERS = {
    **dict.fromkeys(GROUND, set()),
    "trajectory": {"segments"},
    "losses": set(),
    # what a vision-language model's processor makes of images
    "images": {"messages"},
    "templates": {"_upstream", "errors", "images", "messages", "segments"},
    # the interpreter, a package that could stand by itself
    "sandbox": {"_lazy", "errors"},
    "distributed": {"_upstream", "errors"},
    "models": {"_upstream", "images", "steps", "trajectory", "verify"},
    "packing": {"_upstream", "precision"},
    # what the policy may call, what samples, what is kept
    "tools": {"_lazy", "concurrency", "errors", "messages", "sandbox", "trajectory", "version"},
    "engines": {"_lazy", "errors", "images", "messages", "precision"},
    "journal": {"_lazy", "distributed", "errors", "trajectory"},
    "verify": {"_lazy", "concurrency", "messages", "steps", "trajectory", "version"},
    # rows as other tools write them
    "formats": {"messages"},
    # rows to batches; verdicts to rows
    "data": {"_upstream", "errors", "formats", "images", "messages", "segments", "steps", "templates"}
    | {"trajectory", "version"},
    "rows": {"_lazy", "data", "distributed", "messages", "trajectory", "verify"},
    # files that other tools wrote
    "conversion": {"data", "distributed", "formats", "messages", "rows", "trajectory"},
    # the loop of turns
    "rollout": GROUND | {"engines", "formats", "journal", "sandbox", "templates", "tools", "verify"},
    # a few trajectories where people look for them
    "completions": {"_lazy", "messages", "trajectory"},
    # what the online loop rests on
    "online": GROUND
    | {
        "completions",
        "data",
        "distributed",
        "engines",
        "evaluation",
        "journal",
        "rollout",
        "rows",
        "tools",
        "trainer",
        "verify",
    },
    # what there is to see of all that; nothing rests on it
    "viewer": {"data", "distributed", "journal", "messages", "models", "online", "rollout", "trajectory", "verify"}
    | {"_lazy", "formats", "packing", "segments", "version"},
    # never rows, rollouts, tools, engines or verifiers: offline training needs none of them
    "trainer": {
        "_upstream",
        "data",
        "distributed",
        "errors",
        "formats",
        "images",
        "losses",
        "messages",
        "models",
        "packing",
        "templates",
        "trajectory",
    },
}
MOST_FILES_PER_FOLDER = 15


def imported_modules(module: str) -> set[str]:
    """Modules of the package that a module imports, at any depth of its source, under `TYPE_CHECKING` too.

    A package's lazy names are a table of contents, not imports: its `__init__` counts for nothing there.
    """
    spec = importlib.util.find_spec(module)
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(relative, package) if node.level else node.module
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            found |= {name} & set(MODULES)
    return found - {module}


def is_facade(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return bool(spec.submodule_search_locations)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one node that reach each other."""
    found = TopologicalSorter(graph)
    try:
        found.prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


@pytest.mark.parametrize("module", [m for m in MODULES if not m.rpartition(".")[2].startswith("_")])
def test_module_imports(module):
    try:
        importlib.import_module(module)
    except ImportError as error:  # an engine that is an extra says which one
        assert module == "trl_multiturn.engines.vllm.engine" and "vllm" in str(error)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    part = module.split(".")[1]
    if part in LAYERS:
        assert {name.split(".")[1] for name in imported_modules(module)} <= LAYERS[part] | {part}


def test_no_files_import_each_other_in_a_circle():
    graph = {module: imported_modules(module) for module in MODULES if not is_facade(module)}
    assert circles({module: names & set(graph) for module, names in graph.items()}) == []


def test_no_wings_import_each_other_in_a_circle():
    assert circles(LAYERS) == []


@pytest.mark.parametrize("folder", sorted({path.parent for path in ROOT.rglob("*.py")}), ids=lambda path: path.name)
def test_folders_are_small(folder):
    assert len(list(folder.glob("*.py"))) <= MOST_FILES_PER_FOLDER


def lazy_names(package: str) -> dict[str, str]:
    """Public name to defining module, as a type checker reads them under `if TYPE_CHECKING:`."""
    path = Path(importlib.import_module(package).__file__)
    blocks = [node.body for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block if isinstance(node, ast.ImportFrom)]
    homes = {}
    for node in imports:
        home = importlib.util.resolve_name("." * node.level + node.module, package)
        homes |= {alias.asname: home for alias in node.names}  # `X as X` is what makes a name public to them
    return homes


LAZY = [package for package in ("trl_multiturn", *filter(is_facade, MODULES)) if lazy_names(package)]


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_the_names_that_load_lazily(package):
    module, homes = importlib.import_module(package), lazy_names(package)
    assert sorted(homes) == [name for name in module.__all__ if name != "__version__"]
    for name, home in homes.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


def test_offline_training_loads_no_interpreter_no_engine_and_no_verifier():
    code = (
        "import sys\n"
        "from trl_multiturn import DQOTrainer, MultiTurnDPOTrainer, MultiTurnKTOTrainer, OREOTrainer\n"
        "loaded = {name.split('.')[1] for name in sys.modules if name.startswith('trl_multiturn.')}\n"
        "print(sorted(loaded & {'callbacks', 'engines', 'iteration', 'journal'}))\n"
        "print(sorted(loaded & {'rollout', 'rows', 'sandbox', 'tools', 'verify'}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "[]"]


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


def test_the_suite_runs_on_one_thread_whatever_is_exported():
    program = "import tests.conftest, os; print(os.environ['OMP_NUM_THREADS'], os.environ['MKL_NUM_THREADS'])"
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "4"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
