"""A policy that imitates before the first iteration: rows, or its own successes; and the online scripts whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import launch
from tests.support import assistant, byte_tokenizer, save_tiny, user
from trl_multiturn import PythonTool, ScriptedEngine
from trl_multiturn.scripts import warm_start
from trl_multiturn.scripts.arguments import parse_online
from trl_multiturn.scripts.warm_start import warm_started


EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = byte_tokenizer("qwen2_5")
LORA = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
SMALL = ["--use_cpu", "--bf16", "False", "--report_to", "none", "--gradient_checkpointing", "False"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), TOKENIZER)


@pytest.fixture(scope="module")
def parser():
    sys.path.insert(0, str(EXAMPLES))
    import iterative_multi_turn_dpo

    yield iterative_multi_turn_dpo.make_parser()
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def arguments(parser, model, tmp_path):
    def parse(*flags):
        flags = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), *SMALL, *flags]
        flags += ["--warm_start_learning_rate", "0.01", "--warm_start_batch_size", "1"]
        return parse_online(parser, [*flags, "--disable_tqdm", "True"])

    return parse


def problems():
    from datasets import Dataset

    return Dataset.from_list([{"prompt": [user(f"{i} + 1?")], "answer": str(i + 1)} for i in range(3)])


def conversations(folder):
    rows = [{"messages": [user("1 + 1?"), assistant("\\boxed{2}")]}] * 4
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder / "rows.jsonl")


def test_without_a_warm_start_the_model_is_as_named(arguments, model):
    assert warm_started(arguments(), problems(), []) == model


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_rows_are_imitated_with_the_system_message_of_the_rollouts(arguments, model, tmp_path, monkeypatch, lora):
    seen = []
    supervised_rows = warm_start.supervised_rows

    def recorded(rows, tokenizer, **options):
        seen.extend(rows["messages"])
        return supervised_rows(rows, tokenizer, **options)

    monkeypatch.setattr(warm_start, "supervised_rows", recorded)
    parsed = arguments(
        "--warm_start", conversations(tmp_path), "--warm_start_rows", "3", "--system_prompt", "s", *lora
    )
    folder = warm_started(parsed, problems(), [])
    assert [messages[0]["content"] for messages in seen] == ["s"] * 3
    assert sorted(path.name for path in Path(folder).parent.iterdir()) == ["warm_start"]
    before, after = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in (model, folder))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and (not lora or all("q_proj" in name or "v_proj" in name for name in changed))
    assert AutoTokenizer.from_pretrained(folder).chat_template == TOKENIZER.chat_template
    stamp = Path(folder, "model.safetensors").stat().st_mtime_ns
    assert warm_started(parsed, problems(), []) == folder  # found, not made again
    assert Path(folder, "model.safetensors").stat().st_mtime_ns == stamp


def answers(prompt_text, sampling, session):
    """The second of two samples is right, where the problem is not the first."""
    number = int(prompt_text.rpartition(" + 1?")[0].rpartition("\n")[2])
    return f"\\boxed{{{number + 1 if number and session.endswith('/1') else -1}}}"


def test_own_successes_are_imitated(arguments, monkeypatch):
    monkeypatch.setattr(warm_start, "engine_factory", lambda *_: lambda model, _: ScriptedEngine(answers, TOKENIZER))
    told = []
    supervised_rows = warm_start.supervised_rows
    monkeypatch.setattr(warm_start, "supervised_rows", lambda r, t, **_: told.extend(r) or supervised_rows(r, t))
    with PythonTool() as tool:
        warm_started(arguments("--warm_start", "rollouts", "--warm_start_generations", "2"), problems(), [tool])
    assert [(row["prompt_index"], row["reward"]) for row in told] == [(1, 1.0), (2, 1.0)]


def test_no_success_says_what_helps(arguments, monkeypatch):
    wrong = ScriptedEngine(lambda *_: "\\boxed{-1}", TOKENIZER)
    monkeypatch.setattr(warm_start, "engine_factory", lambda *_: lambda *_: wrong)
    parsed = arguments("--warm_start", "rollouts", "--warm_start_generations", "2")
    with PythonTool() as tool, pytest.raises(ValueError, match="None of 6 rollouts is correct.*--num_shots"):
        warm_started(parsed, problems(), [tool])


def test_a_quantized_model_is_refused_before_anything_is_loaded(arguments):
    with pytest.raises(ValueError, match="--load_in_4bit"):
        warm_started(arguments("--warm_start", "rollouts", "--load_in_4bit"), problems(), [])


def run_whole(script, model, folder):
    """A script from a file of conversations to the loop, on a policy of random weights; output and errors."""
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(3)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    flags = {
        "model_name_or_path": model,
        "dataset_name": folder / "problems.jsonl",
        "eval_dataset_name": folder / "problems.jsonl",
        "output_dir": folder / "out",
        "warm_start": conversations(folder),
        "num_shots": 1,
        "num_train_epochs": 2,
        "num_generations": 2,
        "max_turn_tokens": 8,
        "max_trajectory_tokens": 600,
        "max_length": 600,
    }
    pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = launch.run([sys.executable, f"examples/{script}.py", *pairs, *SMALL], COLUMNS="200")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.mark.slow
def test_an_online_script_that_finds_nothing_says_why_and_saves_the_policy_as_it_is(model, tmp_path):
    done = run_whole("iterative_multi_turn_kto", model, tmp_path)
    assert "found no row to train on" in done.stderr and "--warm_start" in done.stderr
    assert "No iteration found a row to train on; the policy, unchanged," in done.stdout
    folders = (tmp_path / "out" / "warm_start", tmp_path / "out")
    warm, saved = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in folders)
    assert all(torch.equal(warm[key], saved[key]) for key in warm)


@pytest.mark.slow
def test_the_evaluation_script_measures_a_saved_policy(model, tmp_path):
    numbers = tmp_path / "numbers.json"
    flags = ["--model_name_or_path", model, "--num_eval_prompts", "3", "--eval_generations", "2", "--device", "cpu"]
    flags += ["--max_turn_tokens", "4", "--max_trajectory_tokens", "400", "--output", str(numbers)]
    done = launch.run([sys.executable, "examples/evaluate.py", *flags])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "pass@1       0.0 ± 0.0 % of 3" in done.stdout
    assert {"pass@1", "mean@2", "pass@2"} <= json.loads(numbers.read_text()).keys()


@pytest.mark.slow
def test_online_oreo_compares_what_its_values_choose(model, tmp_path):
    done = run_whole("iterative_oreo", model, tmp_path)
    assert "Search by value, beam 3, each turn a step" in done.stdout
    assert (tmp_path / "out" / "value_model").is_dir()
