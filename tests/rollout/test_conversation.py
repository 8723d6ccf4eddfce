"""What trajectories with the same tools share: the ids of their answers."""

from __future__ import annotations

import pytest

from tests.support import byte_tokenizer
from trl_multiturn import RolloutConfig
from trl_multiturn.rollout.conversation import SHORT_ANSWER, Conversation
from trl_multiturn.rollout.dialects import Turn
from trl_multiturn.tools import PythonTool


@pytest.fixture
def conversation():
    return Conversation(RolloutConfig(dialect="fenced"), byte_tokenizer(), [PythonTool().schema])


@pytest.fixture
def rendered(conversation, monkeypatch):
    """The observations that the template was asked to render."""
    render, seen = conversation.template.after_turn, []

    def after_turn(messages):
        ids = render(messages)
        return lambda observations: seen.append(observations) or ids(observations)

    monkeypatch.setattr(conversation.template, "after_turn", after_turn)
    conversation._observations_after.cache_clear()
    conversation._short_answer.cache_clear()
    return seen


def turn(text):
    return Turn({"role": "assistant", "content": text}, [], answered=False)


def answer(text):
    return [{"role": "user", "content": text}]


def test_equal_short_answers_are_rendered_once(conversation, rendered):
    first = conversation.observation_ids(turn("a"), answer("35"))
    first.append(-1)  # a caller's list is its own
    second = conversation.observation_ids(turn("another"), answer("35"))
    assert first[:-1] == second and conversation.observation_ids(turn("a"), answer("36")) != second
    assert rendered == [answer("35"), answer("36")]


def test_long_answers_are_not_kept(conversation, rendered):
    long = answer("1" * (SHORT_ANSWER + 1))
    assert conversation.observation_ids(turn("a"), long) == conversation.observation_ids(turn("a"), long)
    assert rendered == [long, long] and conversation._short_answer.cache_info().currsize == 0
