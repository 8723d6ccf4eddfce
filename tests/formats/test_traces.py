"""Traces of `verifiers`: each path through the graph of messages is a row, each sampled token trains once."""

from __future__ import annotations

import json

import pytest

from trl_multiturn import convert_rows
from trl_multiturn.formats import is_trace, read_trace


def node(parent, role, ids, sampled=0, logprobs=(), **message):
    """A message whose last `sampled` tokens the policy sampled."""
    mask = [False] * (len(ids) - sampled) + [True] * sampled
    message = {"role": role, "content": "text", **message}
    kept = {"parent": parent, "message": message, "sampled": bool(sampled), "token_ids": ids, "mask": mask}
    return {**kept, "logprobs": list(logprobs)}


def trace(*nodes, **columns):
    rewards = {"right": {"score": 1.0, "weight": 1.0}, "short": {"score": 0.5, "weight": 0.2}}
    return {"id": "t", "nodes": list(nodes), "rewards": rewards, "ok": True, "errors": [], **columns}


LINE = (
    node(None, "user", [1, 2]),
    node(0, "assistant", [3, 10, 11], 2, [-0.5, -0.25]),
    node(1, "tool", [4, 5], tool_call_id="c"),
    node(2, "assistant", [3, 12], 1, [-1.0]),
)


def test_ids_mask_log_probabilities_and_reward_map_one_to_one():
    (row,) = read_trace(trace(*LINE))
    assert row == {
        "prompt_ids": [1, 2, 3],
        "completion_ids": [10, 11, 4, 5, 3, 12],
        "action_mask": [1, 1, 0, 0, 0, 1],
        "behavior_logps": [-0.5, -0.25, 0.0, 0.0, 0.0, -1.0],
        "reward": 1.1,
        "trace_id": "t",
        "branch": 0,
    }


def test_a_rewritten_history_gives_two_rows_and_what_they_share_trains_once():
    first, second = read_trace(trace(*LINE, node(1, "user", [6]), node(4, "assistant", [3, 13], 1, [-2.0])))
    assert first["action_mask"] == [1, 1, 0, 0, 0, 1]
    assert (second["prompt_ids"], second["completion_ids"]) == ([1, 2, 3, 10, 11, 6, 3], [13])
    assert (second["action_mask"], second["behavior_logps"], second["branch"]) == ([1], [-2.0], 1)


def test_a_turn_without_log_probabilities_leaves_them_out():
    (row,) = read_trace(trace(*LINE[:3], node(2, "assistant", [3, 12], 1)))
    assert "behavior_logps" not in row and row["action_mask"] == [1, 1, 0, 0, 0, 1]


def test_a_trace_without_tokens_is_read_as_messages():
    bare = [{**each, "token_ids": [], "mask": [], "logprobs": []} for each in LINE]
    (row,) = read_trace(trace(*bare, tools=[{"name": "look", "parameters": {}}]))
    assert [message.get("train") for message in row["messages"]] == [None, True, None, True]
    assert row["tools"] == [{"name": "look", "parameters": {}}]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"ok": False, "errors": [{"type": "ProviderError", "message": "x"}]}, "ended in an error"),
        ({"rewards": {"right": None}}, "its reward 'right' was not given"),
        ({"rewards": {}}, "it has no reward"),
        ({"nodes": [LINE[0], {**LINE[1], "logprobs": [-0.5]}]}, "message 1 has 3 tokens.* 1 log-prob.* of 2 sampled"),
    ],
)
def test_what_says_nothing_is_told(columns, match):
    with pytest.raises(ValueError, match=match):
        list(read_trace(trace(*LINE) | columns))


def test_files_of_traces_are_converted(tmp_path):
    assert is_trace(trace(*LINE)) and not is_trace({"nodes": []})
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (trace(*LINE), trace(*LINE, rewards={}))))
    report = convert_rows(str(path), tmp_path / "rows.jsonl", progress=False)
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["completion_ids"] == [10, 11, 4, 5, 3, 12]
    assert (report.rows_written, report.unreadable) == (1, [(1, "it has no reward, so nobody has judged the trace.")])
