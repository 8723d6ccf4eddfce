"""The value that flows: what it refuses, where its turns are, and that it survives JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from trl_multiturn import StopReason, Trajectory, Verdict


def trajectory(**changes):
    """Two turns with an observation between them:

    | completion_ids | 5 6 | 7 8 | 9 |
    | action_mask    | 1 1 | 0 0 | 1 |
    """
    fields = dict(
        prompt=[{"role": "user", "content": "2+2?"}],
        completion=[
            {"role": "assistant", "content": "print(2+2)"},
            {"role": "user", "content": "4"},
            {"role": "assistant", "content": "4"},
        ],
        prompt_ids=[1, 2],
        completion_ids=[5, 6, 7, 8, 9],
        action_mask=[1, 1, 0, 0, 1],
        logps=[-0.5, -0.25, 0.0, 0.0, -1.0],
        stop_reason=StopReason.ANSWERED,
    )
    return Trajectory(**{**fields, **changes})


def test_turns_and_sampled_tokens():
    assert list(trajectory().turn_spans()) == [(0, 2), (4, 5)]
    assert trajectory().num_turns == 2
    assert trajectory().num_sampled_tokens == 3
    assert list(trajectory(action_mask=[0] * 5).turn_spans()) == []


@pytest.mark.parametrize(
    ("changes", "calls"),
    [
        ({}, [1, 0]),  # whatever the dialect: a rollout goes on after calls only
        ({"stop_reason": StopReason.MAX_TURNS}, [1, 1]),
        ({"stop_reason": StopReason.ENDED}, [1, 0]),
        ({"info": {"tool_turns": [0, 1]}}, [1, 1]),  # an environment that ended with the last action
        ({"completion": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, [1, 1]),
        ({"action_mask": [0] * 5}, []),
    ],
)
def test_which_turns_call_tools(changes, calls):
    assert trajectory(**changes).turn_calls == calls


def test_is_undecided_until_judged():
    before = trajectory()
    after = before.judged(Verdict.CORRECT, 1.0)
    assert (before.verdict, before.reward) == (Verdict.UNDECIDED, None)
    assert (after.verdict, after.reward, after.completion_ids) == (Verdict.CORRECT, 1.0, before.completion_ids)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.reward = 1.0


def test_survives_json():
    original = trajectory(verdict=Verdict.INCORRECT, reward=0.0, info={"seed": 3})
    assert Trajectory.from_dict(json.loads(json.dumps(original.to_dict()))) == original


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(action_mask=[1]), "`action_mask` has 1 entries for 5"),
        (dict(logps=[0.0] * 4), "`logps` has 4 entries for 5"),
        (dict(stop_reason="tired"), "tired"),
    ],
)
def test_refuses_what_is_not_aligned(changes, message):
    with pytest.raises(ValueError, match=message):
        trajectory(**changes)


def test_needs_only_the_standard_library():
    code = "import sys, trl_multiturn.trajectory; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
