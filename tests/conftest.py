"""No test downloads anything, takes the core of another worker, or draws other examples than yesterday."""

from __future__ import annotations

import gc
import operator
import os
import random
import sys

import pytest


# Read when the libraries are first imported, so set before any test module imports them
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is not local fails at once instead of waiting for a network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Whatever a user has exported: several threads split a sum by the size of the batch, so that results are promised to
# the last bit on one only; and threads that wait for a core that another worker has cost more
os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))

import hypothesis  # noqa: E402


# The same examples on every machine, however slow: `--hypothesis-profile=default` draws others
hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("same")


# Half a minute of slow tests and more each: they come first, as one at the end would keep one worker busy alone
LONGEST = (
    "test_killed_run.py",
    "examples/test_notebooks.py",
    "test_smollm2.py",
    "examples/test_scripts.py",
    "distributed/test_sharded.py",
    "sandbox/test_attacks.py",
    "test_several_machines.py",
    "scripts/test_warm_start.py",
    "examples/test_offline_values.py",
    "typing/test_types.py",
    "distributed/test_pace.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"tests/{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.nodeid.partition("::")[0], len(ranks)))


def _seed() -> None:
    random.seed(0)
    for name, seed in (("numpy", "random.seed"), ("torch", "manual_seed")):
        if name in sys.modules:  # tests of the sandbox need neither
            operator.attrgetter(seed)(sys.modules[name])(0)


@pytest.fixture(scope="module", autouse=True)
def _same_random_numbers_in_the_modules_fixtures():
    _seed()


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_not_searched_for_garbage():
    """A `Trainer` collects garbage in every run: 0.3 s among the objects of torch and its kin, which all stay."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Whatever else this worker has run: some weights (LoRA's, a value head's) are drawn before a trainer seeds."""
    _seed()
