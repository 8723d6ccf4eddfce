"""The verdict is not the rollout: whatever decides a verdict may change, and finished trajectories are judged anew."""

from __future__ import annotations

import functools
import re

import pytest

from tests.support import byte_tokenizer
from trl_multiturn import RolloutConfig, ScriptedEngine, generate_trajectories
from trl_multiturn.errors import TooManyRewardErrors
from trl_multiturn.rollout import Journal, JournalError, rollouts as rollout_loop
from trl_multiturn.rollout.judging import Judge, judge_again
from trl_multiturn.rollout.provenance import behavior_of, decides_rollouts
from trl_multiturn.tools.base import current_rollout
from trl_multiturn.verify import MathVerifier


TOKENIZER = byte_tokenizer("qwen2_5")


def rows(count=3, answer="1"):
    return [{"prompt": [{"role": "user", "content": f"{i}?"}], "answer": answer} for i in range(count)]


def look(key: str) -> str:
    """
    Looks.

    Args:
        key: Key.
    """
    return key


def peek(key: str) -> str:
    """
    Looks at the row.

    Args:
        key: Key.
    """
    return str(current_rollout().row["answer"])


def broken(completions, **columns):
    return [0.0] * len(completions)


def repaired(completions, answer, **columns):
    return [float(a in completion[-1]["content"]) for completion, a in zip(completions, answer, strict=True)]


def roll(folder, prompts, rewards, tool=look, judge_settings=None, **settings):
    call = f'<tool_call>\n{{"name": "{tool.__name__}", "arguments": {{"key": "a"}}}}\n</tool_call>'
    engine = ScriptedEngine(
        lambda text, sampling, session: "The answer is 1." if "<tool_response>" in text else call, TOKENIZER
    )
    config = RolloutConfig(**{"num_generations": 2, "dialect": "native", **settings})
    arguments = {"reward_funcs": rewards, "journal": folder, "progress": False, **(judge_settings or {})}
    return engine, generate_trajectories(prompts, engine, [tool], config, **arguments)


def fussy(completions, answer, **columns):
    return [float(int(a) == 1) for a in answer]


def mixed_rows(count, every):
    return [{**row, "answer": "?" if i % every == 0 else "1"} for i, row in enumerate(rows(count))]


def test_golds_that_cannot_be_read_are_told_before_the_first_rollout(tmp_path, caplog):
    def refuse(*arguments):
        raise AssertionError("a rollout began")

    engine = ScriptedEngine(refuse, TOKENIZER)
    verifier = MathVerifier(num_workers=1)
    with pytest.raises(ValueError, match="'needs' needs `solution`"):
        generate_trajectories(rows(), engine, [look], reward_funcs=needs, progress=False)
    prompts = [{**row, "answer": "First this.\nThen that."} for row in rows()]
    with pytest.raises(AssertionError, match="a rollout began"):
        generate_trajectories(prompts, engine, [look], reward_funcs=verifier.reward, progress=False)
    assert "3 of the first 3 values of the column `answer` cannot be read" in caplog.text


def needs(completions, solution, **columns):
    return [1.0] * len(completions)


def test_a_few_errors_of_a_reward_function_end_no_run(tmp_path):
    _, judged = roll(tmp_path, mixed_rows(40, 20), fussy, num_generations=1)
    assert [t.info["prompt_index"] for t in judged if t.verdict.value == "undecided"] == [0, 20]
    with Journal(tmp_path) as journal:
        errors = [t.info.get("reward_errors") for t in journal.read()]
    assert [i for i, error in enumerate(errors) if error] == [0, 20]
    assert errors[0] == {"fussy": "ValueError: invalid literal for int() with base 10: '?'"}
    engine, again = roll(tmp_path, mixed_rows(40, 20), fussy, num_generations=1)  # two of two that are left raise
    assert engine.calls == [] and [t.verdict for t in again] == [t.verdict for t in judged]


def test_many_errors_of_a_reward_function_end_the_run_and_cost_no_rollout(tmp_path):
    with pytest.raises(TooManyRewardErrors, match="max_tool_failure_share=0.1.*ValueError.*'fussy'") as raised:
        roll(tmp_path, mixed_rows(40, 2), fussy, num_generations=1)
    assert "It was raised by the reward function 'fussy'." in raised.value.__cause__.__notes__
    _, judged = roll(tmp_path, mixed_rows(40, 2), fussy, num_generations=1, max_tool_failure_share=1.0)
    assert sum(t.verdict.value == "undecided" for t in judged) == 20
    engine, judged = roll(tmp_path, mixed_rows(40, 2), broken, num_generations=1)
    assert engine.calls == [] and all(t.reward == 0.0 and "reward_errors" not in t.info for t in judged)


def test_what_a_reward_function_raised_on_is_judged_again_when_the_run_goes_on(tmp_path):
    seen = []

    def flaky(completions, **columns):
        seen.extend(completions)
        if len(seen) <= 2 * 2:  # the first call, and the one row by row
            raise ConnectionError("no judge")
        return [1.0] * len(completions)

    flaky.version = "1"
    _, judged = roll(tmp_path, rows(2), flaky, num_generations=1, max_tool_failure_share=1.0)
    assert {t.verdict.value for t in judged} == {"undecided"}
    engine, judged = roll(tmp_path, rows(2), flaky, num_generations=1)
    assert engine.calls == [] and {t.verdict.value for t in judged} == {"correct"}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (dict(rewards=broken), dict(rewards=repaired)),
        (dict(rewards=repaired, judge_settings={"correct_threshold": 2.0}), dict(rewards=repaired)),
        (dict(rewards=[repaired, broken]), dict(rewards=[repaired])),
        (dict(rewards=repaired, prompts=rows(answer="2")), dict(rewards=repaired)),
    ],
    ids=["function", "threshold", "one function less", "gold answers"],
)
def test_what_decides_a_verdict_may_change(tmp_path, before, now):
    roll(tmp_path / "changed", **{"prompts": rows(), **before})
    engine, judged = roll(tmp_path / "changed", rows(), **now)
    _, undisturbed = roll(tmp_path / "undisturbed", rows(), **now)
    assert engine.calls == [] and [t.verdict.value for t in judged] == ["correct"] * 6
    assert [(t.verdict, t.reward, t.provenance) for t in judged] == [
        (t.verdict, t.reward, t.provenance) for t in undisturbed
    ]
    assert list(Journal(tmp_path / "changed").read()) == judged


def test_a_verdict_that_is_still_valid_is_not_given_again(tmp_path):
    calls = []

    def counted(completions, **columns):
        calls.append(len(completions))
        return [1.0] * len(completions)

    counted.version = "1"
    roll(tmp_path, rows(), counted)
    roll(tmp_path, rows(5), counted)
    assert sum(calls) == 10
    counted.version = "2"
    engine, _ = roll(tmp_path, rows(5), counted)
    assert engine.calls == [] and sum(calls) == 20


def test_prompts_and_samples_that_are_added_leave_the_others(tmp_path):
    _, first = roll(tmp_path, rows(2), repaired)
    engine, second = roll(tmp_path, rows(3), repaired, num_generations=3)
    assert {call.session for call in engine.calls} == {"0/current/0/2", "0/current/1/2"} | {
        f"0/current/2/{i}" for i in range(3)
    }
    assert [t for t in second if t.info["prompt_index"] < 2 and t.info["sample_index"] < 2] == first


def test_what_a_tool_has_read_may_not_change(tmp_path):
    roll(tmp_path, rows(answer="2"), repaired, tool=peek)
    with pytest.raises(JournalError, match="Prompt 0 is not the one") as raised:
        roll(tmp_path, rows(), repaired, tool=peek)
    assert f"Deleting {tmp_path} " in str(raised.value) and "6 trajectories of 0/current are lost" in str(raised.value)


def test_a_patch_release_goes_on_and_a_new_release_is_refused(tmp_path, monkeypatch):
    roll(tmp_path, rows(), repaired)
    monkeypatch.setattr(rollout_loop, "__version__", "0.1.9")
    engine, _ = roll(tmp_path, rows(), repaired)
    assert engine.calls == []
    monkeypatch.setattr(rollout_loop, "__version__", "0.2.0")
    with pytest.raises(JournalError, match='`version`: "0.1" before, "0.2" now'):
        roll(tmp_path, rows(), repaired)


def test_only_the_release_line_of_an_engine_counts():
    def claim(torch):
        engine = {"engine": "x", "torch_version": torch, "model": "Model-1.5.2"}
        return {"engine": engine, "tools": {"mine": "1.2.3"}, "versions": {"trl_multiturn": "0.1.0"}, "verifiers": 1}

    assert decides_rollouts(claim("2.13.0+cpu")) == decides_rollouts(claim("2.13.1+cu130"))
    assert decides_rollouts(claim("2.13.0")) != decides_rollouts(claim("2.14.0"))
    assert decides_rollouts(claim("2.13.0"))["engine"]["model"] == "Model-1.5.2"
    assert decides_rollouts(claim("2.13.0"))["tools"] == {"mine": "1.2.3"}  # the user's own numbers count


def test_a_finished_journal_is_judged_again_without_an_engine(tmp_path):
    roll(tmp_path, rows(), broken)
    with Journal(tmp_path) as journal:
        judge_again(journal, rows(), Judge(repaired))
    assert {t.verdict.value for t in Journal(tmp_path).read()} == {"correct"}


# What a reward function is known by

PATTERN = re.compile("a")


def helper(text):
    return PATTERN.search(text)


def uses_helper(completions, **columns):
    return [float(bool(helper(str(each)))) for each in completions]


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial], ids=["function", "partial"])
def test_a_repair_in_a_function_that_is_called_is_a_repair(monkeypatch, wrap):
    before = behavior_of(wrap(uses_helper))
    assert behavior_of(wrap(uses_helper)) == before
    monkeypatch.setattr("tests.rollout.test_judging.PATTERN", re.compile("b"))
    changed = behavior_of(wrap(uses_helper))
    monkeypatch.undo()
    monkeypatch.setattr("tests.rollout.test_judging.helper", look)
    assert len({before, changed, behavior_of(wrap(uses_helper))}) == 3


def test_what_a_function_closes_over_counts():
    def make(limit):
        return lambda completions, **columns: [float(len(c) > limit) for c in completions]

    assert behavior_of(make(1)) != behavior_of(make(2))
    assert behavior_of(make(1)) == behavior_of(make(1))
