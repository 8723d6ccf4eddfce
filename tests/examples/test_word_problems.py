"""The embedded default: its tokenizer loses nothing, its splits share nothing, its teacher errs as it says it does."""

from __future__ import annotations

import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from trl.chat_template_utils import (
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)


sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from embedded import (
    tiny_policy,  # noqa: E402
    word_problems as world,  # noqa: E402
)

from trl_multiturn.data.tokenization import tokenize_trajectory  # noqa: E402
from trl_multiturn.rollout.dialects import FencedDialect, choose_dialect  # noqa: E402
from trl_multiturn.sandbox.sandbox import Sandbox  # noqa: E402
from trl_multiturn.tools.python_tool import PythonTool  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_policy.build_tokenizer(world.texts())


@pytest.fixture(scope="module")
def problems():
    return world.make_problems(300, seed=0)


@pytest.fixture(scope="module")
def taught(problems):
    return world.teacher_trajectories(problems, seed=0)


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in (
        "def f(a, b):\n\treturn a ** 2  # naïve — \\boxed{−1}\n",
        "x == 3 != 4 <= 5 ```js\n``` ```python x\n\n```python\n  y\n\n```\n```output\n\n```",
        "ModuleNotFoundError: No module named 'pandas'\r\n",
        "[1, 2.5, .5, 10, 1,2]  12 . 5 a 5 b5 5b",
        "\u65e5\u672c \U0001f40d \x00",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_world_is_written_in_whole_words_and_single_digits(tokenizer, problems, taught):
    contents = {message["content"] for row in taught for message in row["messages"]}
    tokens = {token for content in contents for token in tokenizer.tokenize(content)}
    assert not [token for token in tokens if re.search(r"\d.|.\d", token)]
    # Nothing that the teacher or the interpreter says is spelled in letters, but for words of one letter
    spelled = {token for token in tokens if len(token) == 1 and token.isalpha()}
    assert spelled <= {"x", "y", "s", "I", "Ġ", "Ċ"}
    assert len(tokenizer) < 350


def test_the_template_is_fit_for_training_and_for_tools(tokenizer):
    assert supports_tool_calling(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert choose_dialect("auto", tokenizer, [PythonTool().schema]).name == "native"
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        tools=[PythonTool().schema],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered.startswith("<|im_start|>system\nBe brief.\n\n") and '"name": "python"' in rendered
    assert rendered.endswith("<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "Tom has 12 apples.\n```python\nx = 12\nx\n```<|im_end|>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (loaded.chat_template, loaded.eos_token) == (tokenizer.chat_template, "<|im_end|>")


def test_two_masks_agree_on_what_the_teacher_wrote(tokenizer, taught):
    """The template's generation markers (SFT) and the package's own measurement (M-DPO) name the same tokens."""
    for row in taught.select(range(50)):
        messages = row["messages"]
        marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        measured = tokenize_trajectory(tokenizer, messages[:1], messages[1:])
        assert marked["input_ids"] == measured["prompt_ids"] + measured["completion_ids"]
        assert marked["assistant_masks"][len(measured["prompt_ids"]) :] == measured["action_mask"]
        said = "".join(f"{m['content']}<|im_end|>" for m in messages if m["role"] == "assistant")
        sampled = zip(measured["completion_ids"], measured["action_mask"], strict=True)
        assert tokenizer.decode([token for token, mine in sampled if mine]) == said


def test_problems_mean_what_they_say(problems):
    """Solved again from the text alone, by a reader that knows only the words."""
    signs = {"buys": 1, "picks": 1, "wins": 1, "finds": 1, "saves": 1}
    signs |= {"eats": -1, "loses": -1, "drops": -1, "sells": -1, "gives away": -1}
    factors = {"doubles them": 2, "triples them": 3}
    for row in problems:
        story, question = row["prompt"][0]["content"].split(". ")
        first, *steps = story.split(", ")
        total = int(re.search(r"has (\d+) ", first)[1])
        for step in steps:
            phrase = step.split(" ", 1)[1]
            if phrase in factors:
                total *= factors[phrase]
            else:
                verb, amount = phrase.rsplit(" ", 1)
                total += signs[verb] * int(amount)
        assert row["answer"] == str(total) and question.startswith("How many")


def test_splits_are_disjoint_and_draws_reproducible():
    train, test = world.make_problems(2000, seed=1), world.make_problems(500, seed=1, split="test")
    questions = [{row["prompt"][0]["content"] for row in split} for split in (train, test)]
    assert (len(questions[0]), len(questions[1])) == (2000, 500)
    assert not questions[0] & questions[1]
    assert world.make_problems(50, seed=3).to_list() == world.make_problems(50, seed=3).to_list()
    assert world.make_problems(50, seed=3).to_list() != world.make_problems(50, seed=4).to_list()
    with pytest.raises(ValueError, match="train"):
        world.make_problems(1, seed=0, split="held-out")


def test_observations_are_those_of_a_rollout(taught):
    """Each program, read by the rollout's dialect and run in a fresh session per trajectory, gives the row's words."""
    dialect = FencedDialect([PythonTool().schema])
    with Sandbox() as sandbox:
        for row in taught.select(range(12)):
            with sandbox.open() as session:
                for turn, observation in zip(row["messages"][1::2], row["messages"][2::2], strict=False):
                    read = dialect.read(turn["content"], [], [])
                    results = [session.run(call.arguments["code"]) for call in read.calls]
                    assert dialect.observe(read, results) == [observation]


def test_the_teacher_errs_in_every_way_that_the_filters_know(problems, taught):
    answers = [row["messages"][-1]["content"] for row in taught]
    correct = [said == world.ANSWER.format(p["answer"]) for said, p in zip(answers, problems, strict=True)]
    assert 0.2 < sum(correct) / len(correct) < 0.5
    observations = [[m["content"] for m in row["messages"][2::2]] for row in taught]
    last = [o[-1] for o in observations if o]
    assert any("NameError: name 'y' is not defined" in o for o in last)
    assert any("TypeError: unsupported operand type(s) for +=: 'int' and 'str'" in o for o in last)
    assert any("NameError" in o[0] and "Error" not in o[-1] for o in observations if o)  # repaired
    assert any(not o for o in observations) and world.GIVE_UP in answers  # no program; no answer
    assert any(o.count(",") == 11 for o in last)  # noise
    ignored = [answer for answer, o in zip(answers, observations, strict=True) if o and answer[22:-2] not in o[-1]]
    assert len(ignored) > 5
    assert max(len(o) for o in observations) >= 3


def test_verbs_are_mistaken_at_their_own_rates():
    rng = random.Random(0)
    for verb, meaning in enumerate(world.VERBS):
        problem = {"start": 50, "verbs": [verb], "amounts": [meaning.amounts[0]]}
        wrong = sum(f" {meaning.wrong} " in world.write_program(problem, rng)[1] for _ in range(2000))
        assert wrong / 2000 == pytest.approx(meaning.error_rate, abs=0.045)  # four standard errors
    rates = [verb.error_rate for verb in world.VERBS]
    assert min(rates) >= 0.1 and max(rates) <= 0.65 and sum(rate > 0.5 for rate in rates) >= 4


def test_batches_hold_rows_of_like_length_and_every_row_once(taught):
    order = tiny_policy.batched_by_length(taught, 20, seed=0)
    assert sorted(order) == list(range(len(taught))) and order != tiny_policy.batched_by_length(taught, 20, seed=1)
    lengths = [sum(len(message["content"]) for message in row["messages"]) for row in taught]
    spreads = [[lengths[i] for i in order[start : start + 20]] for start in range(0, len(order), 20)]
    ranges = sorted((min(batch), max(batch)) for batch in spreads)
    assert all(low[1] <= high[0] for low, high in zip(ranges, ranges[1:], strict=False))
    assert ranges != [(min(batch), max(batch)) for batch in spreads]  # but the batches come in no order


def test_warm_start_makes_the_teachers_words_likelier(tokenizer, taught, tmp_path):
    model = tiny_policy.build_policy(tokenizer, seed=0, hidden_size=32, num_layers=1)

    def surprise() -> float:
        rows = [tokenize_trajectory(tokenizer, r["messages"][:1], r["messages"][1:]) for r in taught.select(range(8))]
        losses = []
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            mine = torch.tensor([0] * len(row["prompt_ids"]) + row["action_mask"]).bool()[None]
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids.masked_fill(~mine, -100)).loss.item())
        return sum(losses) / len(losses)

    before = surprise()
    assert before == pytest.approx(math.log(len(tokenizer)), abs=0.5)  # an untrained policy knows nothing
    tiny_policy.warm_start(model, tokenizer, taught, str(tmp_path), batch_size=12, warmup_steps=2, disable_tqdm=True)
    assert surprise() < before - 1
    assert not list(tmp_path.rglob("*.safetensors"))
