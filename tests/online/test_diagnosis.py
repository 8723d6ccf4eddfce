"""Why an iteration found no rows: each cause with its remedy, and a trajectory to look at."""

from __future__ import annotations

import pytest

from tests.support import assistant, user
from trl_multiturn import RolloutConfig, StopReason, Trajectory, Verdict
from trl_multiturn.online.diagnosis import diagnose, transcript
from trl_multiturn.online.report import IterationReport


CONFIG = RolloutConfig(max_turn_tokens=4, max_trajectory_tokens=50)


def trajectory(stop, verdict="incorrect", calls=1, sampled=3, text="Hello."):
    completion = [assistant("first"), user("output"), assistant(text)] if calls else [assistant(text)]
    mask = [1, 0, *[1] * sampled] if calls else [1] * sampled
    return Trajectory(
        [user("What is 1 + 1?")], completion, [1], list(range(len(mask))), mask, StopReason(stop),
        verdict=Verdict(verdict), info={"tool_calls": calls},
    )  # fmt: skip


def explained(*groups, rows=0, dropped=None, **kwargs):
    report = IterationReport(iteration=0)
    for group in groups:
        for one in group:
            report.count(one)
    report.rows, report.dropped = rows, dropped or {}
    return diagnose(groups, report, CONFIG, **kwargs)


@pytest.mark.parametrize(
    ("stop", "calls", "sampled", "finding", "remedy"),
    [
        ("max_tokens", 0, 4, "2 called no tool", "does not speak the tools' format"),
        ("ended", 0, 3, "2 called no tool", "`--warm_start`"),
        ("max_tokens", 1, 4, "limit of a turn (`max_turn_tokens=4`)", "Raise `max_turn_tokens`"),
        ("max_tokens", 1, 3, "limit of a trajectory (`max_trajectory_tokens=50`)", "Raise `max_trajectory_tokens`"),
        ("max_turns", 3, 3, "after the last round (`max_tool_calling_iterations=6`)", "`max_tool_calling_iterations`"),
        ("ended", 1, 3, "2 ended without an answer", "`system_prompt`"),
        ("answered", 1, 3, "2 gave a wrong answer", "too hard"),
    ],
)
def test_what_stopped_the_trajectories_decides_the_remedy(stop, calls, sampled, finding, remedy):
    one = trajectory(stop, calls=calls, sampled=sampled)
    rare = trajectory("answered", calls=1) if "wrong" not in finding else trajectory("ended", calls=1)
    diagnosis = explained([one, one], [rare])
    assert finding in diagnosis.finding and remedy in diagnosis.remedy
    assert diagnosis.example is one
    assert "3 trajectories: 0 correct, 3 incorrect, 0 undecided" in diagnosis.finding


def test_a_policy_without_tools_is_not_told_to_call_them():
    diagnosis = explained([trajectory("answered", calls=0)], has_tools=False)
    assert "gave a wrong answer" in diagnosis.finding and "tool" not in diagnosis.remedy.split("(")[0]


@pytest.mark.parametrize(
    ("verdicts", "kwargs", "remedy"),
    [
        ([["correct", "correct"]], {}, "too easy"),
        ([["correct"], ["incorrect"]], {}, "No prompt had both"),
        ([["correct", "incorrect"]], {"dropped": {"over_length": 1, "duplicate": 0}}, "(over_length 1)"),
        ([["undecided", "undecided", "incorrect"]], {}, "have no verdict"),
        ([["correct", "incorrect"]], {"rows": 1}, "`max_length`"),
    ],
)
def test_verdicts_that_give_no_rows(verdicts, kwargs, remedy):
    groups = [[trajectory("answered", verdict) for verdict in group] for group in verdicts]
    assert remedy in explained(*groups, **kwargs).remedy


def test_a_transcript_is_short_and_says_how_it_ended():
    text = transcript(trajectory("max_tokens", text="word " * 1000))
    assert text.startswith("  [user] What is 1 + 1?\n  [assistant] first\n  [user] output\n  [assistant] word word")
    assert text.endswith(" …\n  [stopped: max_tokens; incorrect]") and len(text) < 600
