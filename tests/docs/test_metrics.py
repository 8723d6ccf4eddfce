"""What is logged and what can be set has its line in the documentation."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import trl_multiturn
from tests.support import assistant, byte_tokenizer, tiny_model, user
from trl_multiturn import IterationReport
from trl_multiturn.online.agreement import agreement_metrics

from .pages import DOCS


PACKAGE = Path(trl_multiturn.__file__).parent
GROUPS = "logits|logps|rewards|loss|value|importance|data|rollout|tools|sampling|search"
# Of transformers' own Trainer, in every log
COMMON = (
    r"loss|grad_norm|learning_rate|epoch|step|total_flos|(train|eval)_(loss|runtime|samples_per_second|"
    r"steps_per_second)"
)
# Page, trainer and configuration
TRAINERS = {
    "dpo": ("MultiTurnDPOTrainer", "MultiTurnDPOConfig"),
    "kto": ("MultiTurnKTOTrainer", "MultiTurnKTOConfig"),
    "oreo": ("OREOTrainer", "OREOConfig"),
    "dqo": ("DQOTrainer", "DQOConfig"),
    "group_regression": ("GroupRegressionTrainer", "GroupRegressionConfig"),
    "step_regression": ("StepRegressionTrainer", "MultiTurnDPOConfig"),
}
# Pages whose metrics another one's are, too
SHARED = {"dqo": "trainers/oreo.md", "step_regression": "trainers/dpo.md"}


def documented(*pages: str) -> set[str]:
    """Names in the first column of the tables of metrics."""
    lines = [
        line for page in pages for line in (DOCS / page).read_text("utf-8").splitlines() if line.startswith("| `")
    ]
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


def rows_for(page: str) -> list[dict]:
    prompt = [user("6 * 7?")]
    good, bad = [assistant("6 * 7"), user("42"), assistant("It is 42.")], [assistant("41")]
    if page == "dpo":
        return [{"prompt": prompt, "chosen": good, "rejected": bad}] * 2
    if page == "step_regression":
        returns = {"chosen_reward": 1.0, "rejected_reward": 0.0}
        return [{"prompt": prompt, "chosen": good, "rejected": bad, **returns}] * 2
    return [{"prompt": prompt, "completion": c, "label": c is good} for c in (good, bad)]


def logged(trainer) -> set[str]:
    return {name for entry in trainer.state.log_history for name in entry if not re.fullmatch(COMMON, name)}


@pytest.mark.parametrize("page", TRAINERS)
def test_each_metric_that_a_trainer_logs_is_explained_on_its_page(page, tmp_path):
    tokenizer = byte_tokenizer()
    trainer_class, config_class = (getattr(trl_multiturn, name) for name in TRAINERS[page])
    values = {"value_model": "head"} if page in ("oreo", "dqo") else {}
    args = config_class(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, logging_steps=1, max_steps=1, save_strategy="no",
        per_device_train_batch_size=2, **values,
    )  # fmt: skip
    trainer = trainer_class(
        tiny_model(tokenizer), args=args, train_dataset=Dataset.from_list(rows_for(page)), processing_class=tokenizer
    )
    trainer.train()
    shared = [SHARED[page]] if page in SHARED else []
    assert logged(trainer) - documented("trainers/index.md", f"trainers/{page}.md", *shared) == set()


def test_each_metric_of_a_value_model_alone_is_explained(tmp_path):
    tokenizer = byte_tokenizer()
    args = trl_multiturn.ValueModelConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, logging_steps=1, max_steps=1, save_strategy="no",
        value_model="head",
    )  # fmt: skip
    rows = Dataset.from_list(rows_for("oreo"))
    trl_multiturn.train_value_model(tiny_model(tokenizer), rows, args, rows, tokenizer)
    evaluated = json.loads((tmp_path / "eval_results.json").read_text("utf-8"))
    named = {name for name in evaluated if name == "eval_loss" or not re.fullmatch(COMMON, name)}
    assert "eval_auc_within_prompt" in named
    assert named - documented("trainers/value_model.md") == set()


def test_each_metric_that_the_sources_name_is_explained_somewhere():
    """Those that a run logs under some conditions only, too."""
    names = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(rf"""["']((?:{GROUPS})/[a-z_0-9{{}}]*[a-z_0-9}}])["']""", path.read_text("utf-8"))
    }
    explained = documented(*(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")))
    # `data/dropped_{name}` and `value/final_` are the beginnings of names
    beginnings = {name.partition("{")[0] for name in names if "{" in name or name.endswith("_")}
    lost = names - explained - {name for name in names if "{" in name or name.endswith("_")}
    lost |= {begin for begin in beginnings if not any(name.startswith(begin) for name in explained)}
    assert len(names) > 40 and lost == set()


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


def test_a_field_without_help_is_in_its_configurations_docstring():
    """Configurations of objects in code, not of the command line; the reference prints their docstrings."""
    for config in (getattr(trl_multiturn, name) for name in trl_multiturn.__all__ if name.endswith("Config")):
        for base in (base for base in inspect.getmro(config) if base.__module__.startswith("trl_multiturn")):
            own = [f for f in dataclasses.fields(base) if f.name in base.__dict__.get("__annotations__", {})]
            without = [f.name for f in own if "help" not in f.metadata]
            assert [name for name in without if f"{name} (" not in base.__doc__] == []


def test_each_public_name_is_in_the_reference():
    pages = "".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented_names = set(re.findall(r"^::: trl_multiturn\.(\w+)$", pages, re.MULTILINE))
    assert set(trl_multiturn.__all__) - {"__version__"} - documented_names == set()
