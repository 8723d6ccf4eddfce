import asyncio
import functools
import math
import threading
import time

import pytest

from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import judge, judge_async, math_reward, paper_reward, resolve_reward_funcs
from trl_multiturn.verify.rewards import check_columns


def trajectory(answer, stop_reason=StopReason.ANSWERED, **info):
    return Trajectory(
        prompt=[{"role": "user", "content": "?"}],
        completion=[{"role": "assistant", "content": rf"\boxed{{{answer}}}"}],
        prompt_ids=[1],
        completion_ids=[2, 3],
        action_mask=[1, 1],
        stop_reason=stop_reason,
        info=info,
    )


def test_columns_reach_the_functions_as_in_trl():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric, **kwargs):
        log_extra("seen", completions)
        log_metric("calls", 1.0)
        seen.update(prompts=prompts, ids=completion_ids, answer=answer, level=level, kwargs=kwargs)
        return [0.25, 1]

    rows = [{"prompt": "dropped", "answer": "1", "level": 3}, {"prompt": "dropped", "answer": "2", "level": 4}]
    judged = judge([trajectory(1, seed=5), trajectory(2)], rows, reward, reward_kwargs={"environments": ["a", "b"]})
    assert seen["prompts"] == [[{"role": "user", "content": "?"}]] * 2
    assert seen["ids"] == [[2, 3]] * 2 and seen["answer"] == ["1", "2"] and seen["level"] == [3, 4]
    assert seen["kwargs"] == {"environments": ["a", "b"]}
    assert [t.reward for t in judged] == [0.25, 1.0]
    assert [t.verdict for t in judged] == [Verdict.INCORRECT, Verdict.CORRECT]
    assert judged[0].info == {"seed": 5, "rewards": {"reward": 0.25}}


def test_weights_and_threshold():
    def first(completions, **kwargs):
        return [1.0, 1.0, 0.0]

    async def second(completions, **kwargs):
        return [0.0, 1.0, 1.0]

    rows = [{}] * 3
    judged = judge([trajectory(0)] * 3, rows, [first, second], reward_weights=[0.5, 2.0], threshold=2.0)
    assert [t.reward for t in judged] == [0.5, 2.5, 2.0]
    assert [t.verdict.value for t in judged] == ["incorrect", "correct", "correct"]
    assert judged[1].info["rewards"] == {"first": 1.0, "second": 1.0}


def test_tool_failures_are_never_shown_to_a_function():
    def count(completions, answer, **kwargs):
        assert len(completions) == len(answer) == 1
        return [1.0]

    failed = trajectory(1, StopReason.TOOL_FAILED)
    judged = judge([failed, trajectory(1)], [{"answer": "1"}] * 2, count)
    assert (judged[0].verdict, judged[0].reward) == (Verdict.UNDECIDED, None)
    assert judged[1].verdict is Verdict.CORRECT
    assert judge([failed], [{"answer": "1"}], count)[0].verdict is Verdict.UNDECIDED
    assert judge([], [], count) == []


def test_none_is_undecided_and_never_outvoted():
    def verifier(completions, **kwargs):
        return [None, float("nan"), 1.0]

    def style(completions, **kwargs):
        return [0.1, 0.1, 0.1]

    judged = judge([trajectory(0)] * 3, [{}] * 3, [verifier, style])
    assert [t.reward for t in judged] == [None, None, 1.1]
    assert [t.verdict.value for t in judged] == ["undecided", "undecided", "correct"]
    assert judged[1].info["rewards"] == {"verifier": None, "style": 0.1}


def test_functions_for_several_tasks_may_skip_rows(caplog):
    def arithmetic(task, **kwargs):
        return [1.0 if name == "arithmetic" else None for name in task]

    def coding(task, **kwargs):
        return [0.0 if name == "coding" else None for name in task]

    rows = [{"task": "arithmetic"}, {"task": "coding"}, {"task": "poetry"}]
    judged = judge([trajectory(0)] * 3, rows, [arithmetic, coding], missing="skip")
    assert [t.verdict.value for t in judged] == ["correct", "incorrect", "undecided"]
    assert not caplog.records
    assert {t.verdict for t in judge([trajectory(0)] * 2, rows[:2], [arithmetic, coding])} == {Verdict.UNDECIDED}
    assert "missing='skip'" in caplog.text


def test_async_functions_run_together():
    together = asyncio.Event()

    async def waits(completions, **kwargs):
        await asyncio.wait_for(together.wait(), 10)
        return [1.0]

    async def releases(completions, **kwargs):
        together.set()
        return [1.0]

    assert judge([trajectory(0)], [{}], [waits, releases])[0].reward == 2.0


def test_judging_inside_a_running_loop():
    async def main():
        return judge([trajectory(3)], [{"answer": "3"}], math_reward)

    assert asyncio.run(main())[0].verdict is Verdict.CORRECT


def test_a_plain_function_runs_in_the_callers_thread_unless_it_would_block_a_loop():
    def where(completions, **kwargs):
        return [float(threading.current_thread() is threading.main_thread())]

    assert judge([trajectory(0)], [{}], where)[0].reward == 1.0
    assert asyncio.run(judge_async([trajectory(0)], [{}], where))[0].reward == 0.0


def test_a_late_function_is_undecided_and_the_others_count():
    release = threading.Event()

    def hangs(completions, **kwargs):
        release.wait(60)
        return [1.0]

    async def sleeps(completions, **kwargs):
        await asyncio.sleep(60)
        return [1.0]

    def quick(completions, **kwargs):
        return [1.0]

    # The quick one has to be so on a crowded machine, too
    start = time.monotonic()
    judged = judge([trajectory(0)], [{}], [hangs, sleeps, quick], timeout_seconds=1.5, missing="skip")[0]
    assert time.monotonic() - start < 30
    assert judged.info["rewards"] == {"hangs": None, "sleeps": None, "quick": 1.0}
    assert judge([trajectory(0)], [{}], [hangs, quick], timeout_seconds=0.2)[0].verdict is Verdict.UNDECIDED
    release.set()


def test_the_users_mistakes_are_raised():
    def broken(completions, **kwargs):
        raise KeyError("answr")

    def short(completions, **kwargs):
        return [1.0]

    def words(completions, **kwargs):
        return ["good"] * len(completions)

    def infinite(completions, **kwargs):
        return [math.inf] * len(completions)

    two, rows = [trajectory(0)] * 2, [{}, {}]
    for timeout in (None, 10.0):
        with pytest.raises(KeyError, match="answr"):
            judge(two, rows, broken, timeout_seconds=timeout)
    with pytest.raises(ValueError, match="'short' returned 1 values for 2"):
        judge(two, rows, short)
    with pytest.raises(ValueError, match="not a number"):
        judge(two, rows, words)
    with pytest.raises(ValueError, match="finite"):
        judge(two, rows, infinite)
    with pytest.raises(ValueError, match="`rows` has 1"):
        judge(two, [{}], short)
    with pytest.raises(ValueError, match="reward_weights"):
        judge(two, rows, words, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="missing"):
        judge(two, rows, words, missing="zero")
    with pytest.raises(ValueError, match="empty"):
        judge(two, rows, [])


def test_a_column_that_a_function_asks_for_is_missed_before_any_rollout():
    def needs(completions, solution, level=0, **kwargs):
        return [1.0] * len(completions)

    def sees(columns):
        seen.append(sorted(columns))

    seen = []
    needs.check_columns = sees
    columns = {"prompt": [[]], "answer": ["1"]}
    with pytest.raises(ValueError, match="'needs' needs `solution`.*'answer'"):
        check_columns([needs], columns)
    check_columns([needs], {**columns, "solution": ["1"]})
    assert seen == [["answer", "prompt", "solution"]]
    with pytest.raises(ValueError, match="`math_reward` was called without `answer`"):
        check_columns([math_reward], {"prompt": [[]]})


def test_names_resolve_to_functions():
    from trl.rewards import accuracy_reward

    assert resolve_reward_funcs("math_reward") == [math_reward]
    assert resolve_reward_funcs(["paper_reward"]) == [paper_reward]
    assert resolve_reward_funcs(["accuracy_reward"]) == [accuracy_reward]
    assert resolve_reward_funcs("trl_multiturn.verify.math_reward") == [math_reward]
    with pytest.raises(ValueError, match="'no_such_reward'"):
        resolve_reward_funcs("no_such_reward")
    with pytest.raises(TypeError, match="not a reward function"):
        resolve_reward_funcs([3])


def test_two_functions_of_one_name_are_kept_apart():
    def reward(scale, completions, **kwargs):
        return [scale]

    judged = judge([trajectory(0)], [{}], [functools.partial(reward, 1.0), functools.partial(reward, 2.0)])
    assert judged[0].info["rewards"] == {"reward": 1.0, "reward_2": 2.0}


def test_trls_own_reward_function_judges():
    judged = judge([trajectory(3), trajectory(4)], [{"solution": "$3$"}] * 2, "accuracy_reward")
    assert [t.verdict for t in judged] == [Verdict.CORRECT, Verdict.INCORRECT]
