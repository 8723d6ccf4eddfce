"""An online script with the real vLLM on a CPU, full and with LoRA, in the environment of `.ci/vllm`."""

from __future__ import annotations

import json
import sys

import pytest
from transformers import AutoModelForCausalLM

from tests import launch
from tests.engines.test_vllm_engine import SIZES, TOKENIZER, needs_vllm
from tests.support import save_tiny


pytestmark = needs_vllm


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "4"]], ids=["full", "lora"])
def test_use_vllm_is_all_that_a_script_needs(tmp_path, lora):
    model = save_tiny(tmp_path / "model", TOKENIZER, seed=0, **SIZES)
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = {
        "model_name_or_path": model,
        "dataset_name": tmp_path / "problems.jsonl",
        "eval_dataset_name": tmp_path / "problems.jsonl",
        "output_dir": tmp_path / "out",
        "num_train_epochs": 1,
        "num_generations": 2,
        "max_turn_tokens": 8,
        "max_trajectory_tokens": 400,
        "max_length": 400,
        "vllm_gpu_memory_utilization": 0.1,  # on a CPU: of the memory, of which vLLM itself takes about 0.8 GiB
        "report_to": "none",
        "bf16": False,
    }
    pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    script = [sys.executable, "examples/iterative_multi_turn_dpo.py", *pairs, *lora, "--use_cpu", "--use_vllm"]
    done = launch.run(script, COLUMNS="200")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Of 6 trajectories" in done.stderr
    (journal,) = (tmp_path / "out/rollouts/iteration_000/journal").glob("*.jsonl")
    assert '"engine": "vllm"' in journal.read_text(encoding="utf-8") or '"engine":"vllm"' in journal.read_text()
    assert lora or AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
