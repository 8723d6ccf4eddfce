"""What is logged and what can be set has its line in the documentation."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import trl_multiturn
from tests.support import assistant, byte_tokenizer, tiny_model, user
from trl_multiturn import IterationReport
from trl_multiturn.online.agreement import agreement_metrics


DOCS = Path(__file__).parents[2] / "docs"
# Of transformers' own Trainer, in every log
COMMON = (
    r"loss|grad_norm|learning_rate|epoch|step|total_flos|(train|eval)_(loss|runtime|samples_per_second|"
    r"steps_per_second)"
)
TRAINERS = {
    "dpo": "MultiTurnDPO",
    "kto": "MultiTurnKTO",
    "oreo": "OREO",
    "dqo": "DQO",
    "group_regression": "GroupRegression",
}


def documented(*pages: str) -> set[str]:
    """Names in the first column of the tables of metrics."""
    lines = [
        line for page in pages for line in (DOCS / page).read_text("utf-8").splitlines() if line.startswith("| `")
    ]
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


@pytest.mark.parametrize("page", TRAINERS)
def test_each_metric_that_a_trainer_logs_is_explained_on_its_page(page, tmp_path):
    tokenizer, prompt = byte_tokenizer(), [user("6 * 7?")]
    good, bad = [assistant("6 * 7"), user("42"), assistant("It is 42.")], [assistant("41")]
    rows = [{"prompt": prompt, "chosen": good, "rejected": bad}] * 2
    if page != "dpo":
        rows = [{"prompt": prompt, "completion": c, "label": c is good} for c in (good, bad)]
    values = {"value_model": "head"} if page in ("oreo", "dqo") else {}
    args = getattr(trl_multiturn, f"{TRAINERS[page]}Config")(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, logging_steps=1, max_steps=1, save_strategy="no",
        per_device_train_batch_size=2, **values,
    )  # fmt: skip
    trainer = getattr(trl_multiturn, f"{TRAINERS[page]}Trainer")(
        tiny_model(tokenizer), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if not re.fullmatch(COMMON, name)}
    shared = ["trainers/oreo.md"] if page == "dqo" else []
    assert logged - documented("trainers/index.md", f"trainers/{page}.md", *shared) == set()


def test_each_metric_of_an_iteration_is_explained():
    report = IterationReport(
        0,
        trajectories=2,
        correct=1,
        incorrect=1,
        tool_calls=2,
        reward_errors=1,
        agreement=agreement_metrics([torch.zeros(4)]),
    )
    assert set(report.metrics()) - documented("loop.md") == set()


def test_each_configuration_of_the_package_has_its_table_of_fields():
    tables = {
        path for page in DOCS.rglob("*.md") for path in re.findall(r"<!-- fields: (\S+) -->", page.read_text("utf-8"))
    }
    public = [getattr(trl_multiturn, name) for name in trl_multiturn.__all__ if name.endswith("Config")]
    ours = {
        base for config in public for base in inspect.getmro(config) if base.__module__.startswith("trl_multiturn")
    }
    with_help = [
        c for c in ours if any("help" in f.metadata for f in dataclasses.fields(c) if f.name in c.__annotations__)
    ]
    assert {f"{config.__module__}.{config.__qualname__}" for config in with_help} - tables == set()


def test_each_public_name_is_in_the_reference():
    pages = "".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented_names = set(re.findall(r"^::: trl_multiturn\.(\w+)$", pages, re.MULTILINE))
    assert set(trl_multiturn.__all__) - {"__version__"} - documented_names == set()
