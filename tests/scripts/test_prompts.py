"""Questions and answers as people have them: files, folders, splits, columns, forms of answers; worked examples."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset, DatasetDict

from tests.support import assistant, byte_tokenizer, user
from trl_multiturn import PythonTool, RolloutConfig, math_reward
from trl_multiturn.scripts.arguments import PromptArguments
from trl_multiturn.scripts.prompts import as_prompts, load_held_out, load_prompts, load_shots, with_shots
from trl_multiturn.scripts.shots import python_shots
from trl_multiturn.scripts.tools import load_tools


ROWS = [{"question": f"{i} + 1?", "answer": str(i + 1), "level": i} for i in range(4)]


def write(form, folder):
    """The rows as a user may have them; the name to pass."""
    rows = Dataset.from_list(ROWS)
    if form == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
        return str(folder / "rows.jsonl")
    if form == "parquet":
        rows.to_parquet(str(folder / "rows.parquet"))
        return str(folder / "rows.parquet")
    if form == "folder of files":
        for split in ("train", "test"):
            rows.to_json(str(folder / f"{split}.jsonl"))
    elif form == "saved splits":
        DatasetDict(train=rows, test=rows).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder of files", "saved splits"])
def test_prompts_come_from_whatever_holds_them(tmp_path, form):
    name = write(form, tmp_path)
    held_out = {"eval_dataset_name": name} if form in ("jsonl", "parquet") else {}
    prompts, eval_prompts = load_prompts(PromptArguments(name, num_eval_prompts=2, **held_out))
    assert prompts[1] == {"answer": "2", "level": 1, "prompt": [user("1 + 1?")]}
    assert (len(prompts), len(eval_prompts)) == (4, 2)


def test_no_test_split_is_a_message_with_the_ways_out(tmp_path):
    name = write("jsonl", tmp_path)
    with pytest.raises(ValueError, match=r"no split 'test' to evaluate on, only 'train'.*--eval_dataset_name"):
        load_prompts(PromptArguments(name))
    assert load_prompts(PromptArguments(name, num_eval_prompts=0))[1] is None
    with pytest.raises(ValueError, match="has no split 'validation', only 'train', 'test'"):
        folder = tmp_path / "splits"
        folder.mkdir()
        load_prompts(PromptArguments(write("saved splits", folder), dataset_train_split="validation"))


@pytest.mark.parametrize("form", ["jsonl", "parquet", "folder of files", "saved splits"])
def test_an_evaluation_needs_no_training_split(tmp_path, form):
    name = write(form, tmp_path)
    for arguments in (PromptArguments(name, num_eval_prompts=3), PromptArguments(None, eval_dataset_name=name)):
        assert load_held_out(arguments)["answer"][:] == ["1", "2", "3", "4"][: arguments.num_eval_prompts]


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({"question": "9 + 9?", "answer": "9 + 9 = <<9+9=18>>18\n#### 18"}, "GSM8K"),
        ({"problem": "9 + 9?", "solution": "So it is $\\boxed{18}$.", "level": "1"}, "MATH"),
        ({"prompt": "9 + 9?", "final_answer": 18}, "plain"),
        ({"prompt": [{"role": "user", "content": "9 + 9?"}], "ground_truth": "18"}, "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_columns_and_answers_in_the_forms_of_known_datasets(columns, answer):
    row = as_prompts(Dataset.from_list([columns]), PromptArguments())[0]
    assert row["prompt"] == [user("9 + 9?")]
    completion = [assistant("\\boxed{18}")]
    assert math_reward([row["prompt"]], [completion], answer=[row["answer"]]) == [1.0]


@pytest.mark.parametrize(
    ("row", "arguments", "message"),
    [
        ({"text": "?"}, {}, "None of the columns text is known to hold the questions. Name it: `--question_column`"),
        ({"question": "?"}, {}, "known to hold the answers. Name it: `--answer_column`"),
        ({"question": "?", "answer": "1"}, {"answer_column": "gold"}, "no column 'gold' with the answers"),
        ({"question": " ", "answer": "1"}, {}, "Row 0: the column `question` holds ' '"),
    ],
)
def test_what_is_missing_is_named(row, arguments, message):
    with pytest.raises(ValueError) as error:
        as_prompts(Dataset.from_list([row]), PromptArguments(**arguments))
    assert message in str(error.value)


def test_rewards_of_ones_own_need_no_answers():
    prompts = as_prompts(Dataset.from_list([{"question": "?"}]), PromptArguments(reward_funcs=["my.reward"]))
    assert prompts.column_names == ["prompt"]


# Worked examples


def test_worked_examples_stand_in_front_and_after_a_system_message():
    shots = [[user("q"), assistant("a")]]
    system = {"role": "system", "content": "s"}
    prompts = Dataset.from_list([{"prompt": [user("x")]}, {"prompt": [system, user("x")]}])
    assert with_shots(prompts, shots)["prompt"][:] == [
        [*shots[0], user("x")],
        [system, *shots[0], user("x")],
    ]


@pytest.mark.parametrize("dialect", ["fenced", "native"])
def test_worked_examples_are_true(dialect):
    """Each program prints what the example says, and the answer is that."""
    config, tokenizer = RolloutConfig(dialect=dialect), byte_tokenizer("qwen2_5")
    with PythonTool() as tool:
        shots = python_shots(3, config, tokenizer, [tool])
        assert len(shots) == 3
        for _, program, observation, answer in shots:
            if dialect == "native":
                code, output = program["tool_calls"][0]["function"]["arguments"]["code"], observation["content"]
            else:
                code = program["content"].removeprefix("```python\n").removesuffix("\n```")
                output = observation["content"].removeprefix("```output\n").removesuffix("\n```")
            session = tool.open()
            assert session.run(code=code).output.strip() == output
            session.close()
            assert f"\\boxed{{{output}}}" in answer["content"]


def test_worked_examples_of_other_tools_are_the_users(tmp_path):
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: First.
            b: Second.
        """
        return a + b

    with pytest.raises(ValueError, match="worked examples of add.*--shots_name"):
        python_shots(1, RolloutConfig(), byte_tokenizer("qwen2_5"), [add])
    rows = [{"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a")]}]
    (tmp_path / "shots.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert load_shots(str(tmp_path / "shots.jsonl"), 1) == [[user("q"), assistant("a")]]
    with pytest.raises(ValueError, match="holds 1 worked examples, fewer than"):
        load_shots(str(tmp_path / "shots.jsonl"), 2)


# Tools


def test_tools_by_name():
    python, function, made = load_tools(["python", "math.sqrt", "trl_multiturn.PythonTool"])
    assert isinstance(python, PythonTool) and function(4) == 2 and isinstance(made, PythonTool)


@pytest.mark.parametrize("name", ["nothing", "no.such.module", "math.nothing", "math.pi"])
def test_a_tool_that_is_none_is_named(name):
    with pytest.raises(ValueError, match=f"`--tools {name}`"):
        load_tools([name])
