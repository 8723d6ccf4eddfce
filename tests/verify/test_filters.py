from dataclasses import replace

import pytest

from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import AUTHORS_FILTERS, FILTERS, PAPER_FILTERS, Filter, apply_filters, over_length
from trl_multiturn.verify.filters import is_error, turns_with_errors


CODE = "Let us compute.\n```python\nprint(6 * 7)\n```"


def fenced(*outputs, answer=r"\boxed{42}", code=CODE):
    """A trajectory in the fenced dialect: one code turn per output, then the answer."""
    messages = []
    for output in outputs:
        messages.append({"role": "assistant", "content": code})
        messages.append({"role": "user", "content": f"```output\n{output}\n```"})
    return [*messages, {"role": "assistant", "content": answer}]


def native(*outputs, answer=r"\boxed{42}"):
    """The same in the native dialect; a tuple of outputs is one turn of parallel calls."""
    messages = []
    for output in outputs:
        results = output if isinstance(output, tuple) else (output,)
        call = {"type": "function", "function": {"name": "python", "arguments": {"code": "print(6 * 7)"}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call] * len(results)})
        messages.extend({"role": "tool", "name": "python", "content": result} for result in results)
    return [*messages, {"role": "assistant", "content": answer}]


def trajectory(completion, verdict=Verdict.CORRECT, stop_reason=StopReason.ANSWERED, tokens=10):
    return Trajectory(
        prompt=[{"role": "user", "content": "?"}],
        completion=completion,
        prompt_ids=[0] * 5,
        completion_ids=[1] * tokens,
        action_mask=[1] * tokens,
        stop_reason=stop_reason,
        reward=float(verdict is Verdict.CORRECT),
        verdict=verdict,
    )


def dropped_by(name, completion, **kwargs):
    return apply_filters([trajectory(completion, **kwargs)], [name]).reasons == [name]


@pytest.mark.parametrize("dialect", [fenced, native])
@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("error_before_answer", ("42", "NameError: name 'x' is not defined"), ("NameError: name 'x'", "42")),
        ("no_tool_call", (), ("42",)),
        ("boxed_after_error", ("ZeroDivisionError: division by zero",), ("42",)),
        ("empty_output_before_answer", ("42", "[]"), ("[]", "42")),
        ("answer_not_in_output", ("41", "420"), ("41", "(42.0, 3)")),
    ],
)
def test_filters_by_observations(dialect, name, bad, good):
    assert dropped_by(name, dialect(*bad))
    assert not dropped_by(name, dialect(*good))


def test_an_error_among_parallel_calls_counts():
    assert dropped_by("error_before_answer", native("42", ("42", "{'error': 'Unknown tool'}")))
    assert not dropped_by("error_before_answer", native(("42", "{'error': 'Unknown tool'}"), "42"))


def test_turn_without_code():
    assert not dropped_by("turn_without_code", fenced("1", "42"))
    assert not dropped_by("turn_without_code", native("1", "42"))
    assert not dropped_by("turn_without_code", fenced("1", code="~~~Python\nprint(1)\n~~~"))
    assert dropped_by("turn_without_code", fenced("1", code="I think it is 42."))
    assert dropped_by("turn_without_code", fenced("1", code="Call ```python inline"))
    assert not dropped_by("turn_without_code", fenced(answer="No code in the only turn."))


def test_limits():
    assert dropped_by("over_length", fenced("42"), tokens=2044)  # 5 + 2044 > 2048
    assert not dropped_by("over_length", fenced("42"), tokens=2043)
    assert dropped_by("long_answer", fenced("42", answer=r"\boxed{" + "1+" * 11 + "1}"))
    assert dropped_by("call_limit", fenced("42"), stop_reason=StopReason.MAX_TURNS)
    assert not dropped_by("call_limit", fenced("42"), stop_reason=StopReason.MAX_TOKENS)
    assert dropped_by("not_answered", fenced("42"), stop_reason=StopReason.MAX_TOKENS)
    assert not dropped_by("not_answered", fenced("42"))


def test_winner_filters_leave_losers_alone():
    bad = fenced("NameError: x")
    assert dropped_by("error_before_answer", bad, verdict=Verdict.CORRECT)
    assert not dropped_by("error_before_answer", bad, verdict=Verdict.INCORRECT)
    both = FILTERS["error_before_answer"].on("both")
    assert apply_filters([trajectory(bad, verdict=Verdict.INCORRECT)], [both]).dropped == {"error_before_answer": 1}


@pytest.mark.parametrize(
    "text",
    [
        "NameError: name 'x' is not defined",
        "printed first\nValueError: bad",
        "sympy.polys.polyerrors.PolynomialError: not a polynomial",
        "KeyboardInterrupt",
        "TimeoutError: the cell ran longer than 10 seconds",
        "Timeout Error",
        "Execution error: boom",
        "{'error': 'Unknown tool'}",
        '{"error": "Unknown tool"}',
        "Traceback (most recent call last)\n  ...",
        "Error: no such file",
    ],
)
def test_errors_are_recognised(text):
    assert is_error(text)


@pytest.mark.parametrize(
    "text",
    [
        "42",
        "relative error: 0.01",
        "no errors found",
        "errors = 3",
        "{'errors': 0}",
        "",
        "error: 0",
        "Error: 0.25",
        "max_error: 0.5",
        "mean squared error",
        "timeout: 30",
    ],
)
def test_other_outputs_are_not_errors(text):
    assert not is_error(text)


def recorded(completion, statuses, turns=None):
    """A winner whose rollout recorded the status of each call: one call a turn, unless `turns` says otherwise."""
    made = trajectory(completion)
    places = list(range(len(statuses))) if turns is None else turns
    info = {"turns": made.num_turns, "tool_statuses": statuses, "tool_turns": places}
    return replace(made, info=info)


@pytest.mark.parametrize("dialect", [fenced, native])
def test_the_recorded_status_says_what_is_an_error(dialect):
    text = "NameError: name 'x' is not defined"
    kept = recorded(dialect("42", text), ["error", "ok"])  # the policy printed what it had caught
    dropped = recorded(dialect("42", "Mismatched elements: 1"), ["ok", "error"])
    result = apply_filters([kept, dropped], ["error_before_answer"])
    assert result.reasons == [None, "error_before_answer"]
    result = apply_filters([recorded(dialect("42"), ["error"])], ["boxed_after_error"])
    assert result.reasons == ["boxed_after_error"]


def test_where_no_call_is_recorded_the_text_decides():
    # the turns that a completion began with, and a call that could not be read
    made = recorded(fenced("42", "NameError: x", "SyntaxError: not closed", "7"), ["ok"], turns=[3])
    assert turns_with_errors(made) == [False, True, True, False, False]


def test_statuses_of_parallel_calls_belong_to_their_turn():
    made = recorded(native(("1", "2"), "42"), ["ok", "error", "ok"], turns=[0, 0, 1])
    assert turns_with_errors(made) == [True, False, False]


def test_records_of_another_number_of_turns_are_not_believed():
    made = recorded(fenced("42", "NameError: x"), ["ok", "ok"])
    made = replace(made, info={**made.info, "turns": 9})
    assert turns_with_errors(made) == [False, True, False]


def test_counts_add_up_and_each_trajectory_counts_once():
    trajectories = [
        trajectory(fenced("42")),
        trajectory(fenced("NameError: x"), tokens=3000),  # two reasons: the first filter counts
        trajectory(fenced("42"), tokens=3000, verdict=Verdict.INCORRECT),
        trajectory(fenced("42"), verdict=Verdict.UNDECIDED),
        trajectory(fenced("42"), stop_reason=StopReason.TOOL_FAILED),
        trajectory(fenced("41"), verdict=Verdict.INCORRECT),
    ]
    result = apply_filters(trajectories)
    assert result.reasons == [None, "error_before_answer", "over_length", "undecided", "tool_failed", None]
    assert result.dropped == {"error_before_answer": 1, "over_length": 1, "undecided": 1, "tool_failed": 1}
    assert result.kept == [trajectories[0], trajectories[5]]
    assert len(result.kept) + result.dropped.total() == len(trajectories)


def test_switching_filters_off_keeps_all_that_has_a_verdict():
    trajectories = [
        trajectory(fenced("NameError: x"), tokens=3000),
        trajectory(fenced("42"), verdict=Verdict.UNDECIDED),
    ]
    assert apply_filters(trajectories, ()).reasons == [None, "undecided"]


def test_own_filters_and_limits():
    shouting = Filter("shouting", "text in capitals", lambda t: t.completion[-1]["content"].isupper(), "losers")
    loud = fenced("42", answer="NO")
    trajectories = [trajectory(loud), trajectory(loud, verdict=Verdict.INCORRECT), trajectory(loud, tokens=30)]
    assert apply_filters(trajectories, [shouting, over_length(20)]).reasons == [None, "shouting", "over_length"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no filter 'eror'.*error_before_answer"):
        apply_filters([], ["eror"])
    with pytest.raises(ValueError, match="applies_to"):
        FILTERS["over_length"].on("chosen")


def test_the_named_sets_exist_and_every_filter_describes_itself():
    assert set(PAPER_FILTERS) < set(AUTHORS_FILTERS) < set(FILTERS)
    assert all(name == filter.name and filter.description for name, filter in FILTERS.items())
