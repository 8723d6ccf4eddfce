"""
A real pretrained chat model, SmolLM2-135M-Instruct, through each part: masks, rollouts, a training step, log-probs.

The model comes from a package (`examples/fetch_smollm2.py`), or from the folder that `SMOLLM2` names.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import assistant, render_actions, user
from tests.trainer.helpers import logged
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    PythonTool,
    RolloutConfig,
    SamplingParams,
    TransformersEngine,
    generate_trajectories,
    tokenize_trajectory,
)
from trl_multiturn.scripts.prompts import with_shots
from trl_multiturn.scripts.shots import python_shots


pytestmark = [pytest.mark.slow, pytest.mark.smollm2]

ROOT = Path(__file__).parents[1]
SYSTEM = {"role": "system", "content": "Solve with Python. Put the answer in \\boxed{}."}
QUESTION = user("Mia has 22 shells. She picks 17. She saves 26. How many shells now?")
PROGRAM, OUTPUT = assistant("```python\nx = 22 + 17 + 26\nx\n```"), user("```output\n65\n```")
ANSWER = assistant("The answer is \\boxed{65}.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if "SMOLLM2" in os.environ:
        return os.environ["SMOLLM2"]
    folder = tmp_path_factory.mktemp("model") / "smollm2"
    subprocess.run([sys.executable, ROOT / "examples/fetch_smollm2.py", folder], check=True)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_it_is_the_model_and_reads_digit_by_digit(model, tokenizer):
    assert model.num_parameters() == 134_515_008 and model.dtype == torch.float32
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]


def test_masks_cover_what_it_would_sample_under_its_own_template(tokenizer):
    row = tokenize_trajectory(tokenizer, [SYSTEM, QUESTION], [PROGRAM, OUTPUT, ANSWER])
    assert render_actions(tokenizer, row) == [f"{turn['content']}<|im_end|>" for turn in (PROGRAM, ANSWER)]
    whole = tokenizer.apply_chat_template([SYSTEM, QUESTION, PROGRAM, OUTPUT, ANSWER], tokenize=False)
    assert tokenizer.decode(row["prompt_ids"] + row["completion_ids"]) == whole


def test_rollouts_with_the_real_interpreter_are_recorded_as_they_were_sampled(model, tokenizer):
    config = RolloutConfig(
        num_generations=10, max_turn_tokens=40, max_trajectory_tokens=400, max_tool_calling_iterations=2,
        dialect="fenced", system_prompt=SYSTEM["content"], temperature=0.5,
    )  # fmt: skip
    with PythonTool() as tool:
        shots = python_shots(2, config, tokenizer, [tool])
        prompts = with_shots(Dataset.from_list([{"prompt": [QUESTION]}]), shots)
        trajectories = generate_trajectories(prompts, TransformersEngine(model, tokenizer), [tool], config)
    assert len(trajectories) == 10
    assert sum(t.info["tool_calls"] for t in trajectories) >= 5  # two worked examples are enough for the format
    for trajectory in trajectories:
        row = {"completion_ids": trajectory.completion_ids, "action_mask": trajectory.action_mask}
        turns = [m["content"] for m in trajectory.completion if m["role"] == "assistant"]
        assert [text.removesuffix("<|im_end|>") for text in render_actions(tokenizer, row)] == turns


def test_a_packed_training_step_equals_a_padded_one(folder, tokenizer, tmp_path):
    wrong = [assistant("```python\nx = 22 + 17 - 26\nx\n```"), user("```output\n13\n```"), assistant("\\boxed{13}")]
    rows = [{"prompt": [SYSTEM, QUESTION], "chosen": [PROGRAM, OUTPUT, ANSWER], "rejected": wrong}] * 2
    dataset, losses, norms = Dataset.from_list(rows), [], []
    for packed in ("true", "false"):
        args = MultiTurnDPOConfig(
            output_dir=str(tmp_path), packed=packed, max_steps=1, per_device_train_batch_size=2, logging_steps=1,
            learning_rate=1e-5, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, precompute_ref_log_probs=True,
        )  # fmt: skip
        trainer = MultiTurnDPOTrainer(folder, args=args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        losses += logged(trainer, "loss")
        norms += logged(trainer, "grad_norm")
    assert losses == pytest.approx([0.6931, 0.6931], abs=1e-4)  # policy and reference are one: log 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0] > 0


def test_the_engines_log_probs_are_those_of_a_forward_pass(model, tokenizer):
    ids = tokenizer.apply_chat_template([SYSTEM, QUESTION], add_generation_prompt=True, return_dict=True)["input_ids"]
    engine, sampling = TransformersEngine(model, tokenizer), SamplingParams(max_new_tokens=24, temperature=1.0, seed=1)
    generation = asyncio.run(engine.generate(ids, sampling))
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids + generation.token_ids])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
    assert generation.logps == pytest.approx(expected.tolist(), abs=1e-3)
