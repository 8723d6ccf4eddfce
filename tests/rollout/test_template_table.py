"""The table of chat templates in the docs is what the templates do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
FAMILIES = ("gemma3", "glm4moe", "gptoss", "lfm2_v2", "llama3_1", "qwen2_5")  # one of each kind of reader


@pytest.mark.slow
def test_the_table_of_chat_templates_is_true():
    spec = importlib.util.spec_from_file_location("chat_templates", ROOT / "benchmarks" / "chat_templates.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = (ROOT / "docs" / "templates.md").read_text(encoding="utf-8").splitlines()
    templates = dict(script.shipped_templates())
    for family in FAMILIES:
        assert script.row(family, templates[family]) in written
