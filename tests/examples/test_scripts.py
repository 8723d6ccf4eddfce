"""The example scripts as a user would start them: a command, tiny inputs, and a saved model that loads."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import launch
from tests.support import TOOLS, byte_tokenizer, preference_rows, save_tiny


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "0.01"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), byte_tokenizer("qwen2_5"), architecture="llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of text rows with tools, one per kind."""
    folder = tmp_path_factory.mktemp("rows")
    tools = json.dumps(TOOLS)
    pairs = [{**row, "tools": tools} for row in preference_rows(6)]
    trajectories = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen", "tools": tools}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    for name, content in (("preference", pairs), ("trajectory", trajectories)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)), encoding="utf-8")
    return folder


def run(script, output, *arguments, command=None, returncode=0):
    """Runs an example by the beginning of a command, or forked; its standard output and error in one text."""
    run = [f"examples/{script}.py", "--output_dir", str(output), "--use_cpu", "--bf16", "False"]
    run += ["--report_to", "none", "--save_strategy", "no", "--logging_steps", "1", *map(str, arguments)]
    done = launch.run([*command, *run], COLUMNS="200") if command else launch.run_forked(*run, COLUMNS="200")
    assert done.returncode == returncode, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def trained(output, model):
    """The parameters by which the saved model, loaded as any user would, differs from the one it started from."""
    adapter = (output / "adapter_config.json").exists()
    loaded = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(output)
    if adapter:
        loaded = loaded.merge_and_unload()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    after = loaded.state_dict()
    assert after.keys() == before.keys()
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(model).chat_template
    return {name for name in after if not torch.equal(after[name], before[name])}


SCRIPTS = {"multi_turn_dpo": "preference", "multi_turn_kto": "trajectory", "sft": "trajectory"}
SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "2"]

# Each script starts once by the very command of a user; then forked, which spares the imports
COMMAND = [sys.executable]
BY_COMMAND = [("multi_turn_dpo", False), ("multi_turn_kto", True), ("sft", False)]


# One script full and one with LoRA in the quick run, the others beside them in the slow one
@pytest.mark.parametrize(
    ("script", "lora"),
    [
        ("multi_turn_dpo", False),
        ("multi_turn_kto", True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("multi_turn_dpo", True), ("multi_turn_kto", False), ("sft", False), ("sft", True))
        ),
    ],
)
def test_an_offline_script_leaves_a_model_that_loads(tmp_path, model, rows, script, lora):
    arguments = [*SMALL, *(LORA if lora else ["--learning_rate", "0.01"])]
    text = run(script, tmp_path, "--model_name_or_path", model, "--dataset_name", rows / f"{SCRIPTS[script]}.jsonl",
               *arguments, command=COMMAND if (script, lora) in BY_COMMAND else None)  # fmt: skip
    assert "✅ Training completed." in text
    changed = trained(tmp_path, model)
    assert changed and (not lora or all("q_proj" in name or "v_proj" in name for name in changed))
    if script != "sft":  # TRL's own trainer has no preview
        assert "turn 2" in text and re.search(r"\d+ of \d+ tokens trained", text)


@pytest.mark.slow
def test_sft_keeps_the_correct_rows_only(tmp_path, model, rows):
    arguments = ["--model_name_or_path", model, "--dataset_name", rows / "trajectory.jsonl", "--only_correct"]
    text = run("sft", tmp_path, *arguments, "--num_train_epochs", "1", "--per_device_train_batch_size", "1")
    assert len(re.findall(r"'grad_norm'", text)) == 6  # of twelve rows


@pytest.mark.slow
def test_two_processes(tmp_path, model, rows):
    """The command of the docstring: each process trains on its half of the six rows, one model is saved."""
    arguments = ["--model_name_or_path", model, "--dataset_name", rows / "preference.jsonl", "--num_train_epochs", "1"]
    text = run("multi_turn_dpo", tmp_path, *arguments, "--per_device_train_batch_size", "1", "--learning_rate", "0.01",
               command=launch.accelerate_launch(2))  # fmt: skip
    assert len(re.findall(r"'grad_norm'", text)) == 3
    assert text.count("✅ Training completed.") == 1 and text.count("tokens trained") == 2  # one pair, shown once
    assert trained(tmp_path, model)


# RAFT

RAFT = ["--system_prompt", "", "--num_generations", "2", "--max_turn_tokens", "80", "--max_trajectory_tokens", "512"]


def test_raft_says_when_there_is_nothing_to_imitate(tmp_path, model):
    arguments = ["--model_name_or_path", model, "--num_prompts", "2", *RAFT, "--max_turn_tokens", "8"]
    text = run("raft", tmp_path, *arguments, command=COMMAND, returncode=1)
    assert "None of 4 rollouts is correct, so there is nothing to imitate." in text
    assert not (tmp_path / "model.safetensors").exists()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A policy that `sft.py` taught the programs of four problems by heart."""
    from embedded.tiny_policy import build_tokenizer
    from embedded.word_problems import ANSWER, CODE, OBSERVATION, VERBS, make_problems, tell, texts

    def solution(problem):
        lines = [f"x = {problem['start']}"]
        steps = tell(problem["verbs"], problem["amounts"])
        for verb, amount, step in zip(problem["verbs"], problem["amounts"], steps, strict=True):
            lines.append(f"# {step}\nx {VERBS[verb].right} {amount}")
        turns = [CODE.format("\n".join([*lines, "x"])), OBSERVATION, ANSWER]
        roles = ("assistant", "user", "assistant")
        turns = [turns[0], *(turn.format(problem["answer"]) for turn in turns[1:])]
        return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]

    problems = make_problems(4, seed=1000)  # the first that the script asks
    rows = [{"prompt": p["prompt"], "completion": solution(p), "label": True} for p in problems]
    folder = tmp_path_factory.mktemp("taught")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = save_tiny(
        folder / "model",
        build_tokenizer(texts()),
        architecture="llama",
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    run("sft", folder / "policy", "--model_name_or_path", model, "--dataset_name", folder / "rows.jsonl",
        "--max_steps", "60", "--per_device_train_batch_size", "4", "--learning_rate", "0.01")  # fmt: skip
    return folder / "policy"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_raft_imitates_its_winners(tmp_path, taught, lora):
    """What the policy answers, it goes on from."""
    output = tmp_path / "out"
    text = run("raft", output, "--model_name_or_path", taught, "--num_prompts", "4", *RAFT, *SMALL,
               *(LORA if lora else ["--learning_rate", "0.01"]))  # fmt: skip
    accepted = int(re.search(r"(\d+) accepted answers of 8 rollouts", text)[1])
    assert 2 <= accepted <= 4  # one per problem, of two tries each
    assert trained(output, taught)
    assert len(list((output / "journal").rglob("*.jsonl"))) >= 1
