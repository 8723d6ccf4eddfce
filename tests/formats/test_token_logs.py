"""Logs with token ids become token rows with the very ids."""

from __future__ import annotations

import pytest

from trl_multiturn.formats import read_token_log, recognize


ROW = {
    "prompt_ids": [1, 2],
    "completion_ids": [3, 4, 5, 6, 7],
    "action_mask": [1, 1, 0, 0, 1],
    "behavior_logps": [-0.1, -0.2, 0.0, 0.0, -0.3],
    "reward": 1.0,
}
MESSAGES = [
    {"role": "user", "content": "?", "token_ids": [1, 2]},
    {"role": "assistant", "content": "call", "token_ids": [3, 4], "generation_logprobs": [-0.1, -0.2]},
    {"role": "environment", "content": "6", "token_ids": [5, 6]},
    {"role": "assistant", "content": "6", "token_ids": [7], "generation_logprobs": [-0.3]},
]
STEPS = [
    {"prompt_ids": [1, 2], "completion_ids": [3, 4], "completion_mask": [1, 1], "completion_logprobs": [-0.1, -0.2]},
    {"prompt_ids": [1, 2, 3, 4, 5, 6], "completion_ids": [7], "completion_mask": [1], "completion_logprobs": [-0.3]},
]
CALLS = [
    {"type": "message", "prompt_token_ids": s["prompt_ids"], "generation_token_ids": s["completion_ids"]}
    for s in STEPS
]
WRITTEN = {
    "messages": {"message_log": MESSAGES, "total_reward": 1.0},
    "messages with masks": {
        "messages": [
            {**m, "token_loss_mask": [int("generation_logprobs" in m)] * len(m["token_ids"])} for m in MESSAGES
        ],
        "reward": 1.0,
    },
    "steps": {"trajectory": [{"tokens": step, "reward": None} for step in STEPS], "reward": 1.0},
    "calls": {
        "response": {"output": [CALLS[0] | {"generation_log_probs": [-0.1, -0.2]}, {"type": "tool"}, CALLS[1]]},
        "reward": 1.0,
    },
    "sides": {
        "prompt_token_ids": [1, 2],
        "response_ids": ROW["completion_ids"],
        "response_mask": ROW["action_mask"],
        "logprobs": [-0.1, -0.2, -9.0, -9.0, -0.3],
        "reward": 1.0,
    },
    "the whole": {
        "input_ids": [1, 2, *ROW["completion_ids"]],
        "labels": [-100, -100, 3, 4, -100, -100, 7],
        "reward": 1.0,
    },
}


@pytest.mark.parametrize("form", WRITTEN)
def test_logs_become_token_rows(form):
    assert recognize(WRITTEN[form]) == "logs"
    scored = form not in ("calls", "the whole")
    assert read_token_log(WRITTEN[form]) == (
        ROW if scored else {k: v for k, v in ROW.items() if k != "behavior_logps"}
    )


def test_messages_of_which_some_hold_no_ids_are_read_as_messages():
    assert recognize({"messages": [{"role": "user", "content": "?"}, *MESSAGES[1:]]}) == "openai"
    answers = [{"prompt_token_ids": s["prompt_ids"], "token_ids": s["completion_ids"]} for s in STEPS]
    messages = [{"role": "user", "content": "?"}] + [
        {"role": "assistant", "content": "!"} | answer for answer in answers
    ]
    found = read_token_log({"messages": messages})
    assert found == {name: ROW[name] for name in ("prompt_ids", "completion_ids", "action_mask")}


def test_turns_without_log_probabilities_beside_others_are_history():
    history = [{"role": "assistant", "content": "hi", "token_ids": [9]}, *MESSAGES]
    assert read_token_log({"message_log": history})["prompt_ids"] == [9, 1, 2]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (
            {"trajectory": [STEPS[0], {**STEPS[1], "prompt_ids": [1, 2, 3, 9]}]},
            "the prompt of step 1 does not begin with",
        ),
        ({"messages": [*MESSAGES, {"role": "user", "content": "x"}]}, "no column holds the token ids of a whole"),
        ({"messages": [MESSAGES[0], {**MESSAGES[1], "token_ids": [3]}]}, "1 sampled tokens but 2 log-probabilities"),
        ({"prompt_ids": [1], "response_ids": [2]}, "no mask, so nothing says which of them the policy sampled"),
        ({"prompt_ids": [1], "response_ids": [2], "response_mask": [1, 0]}, "the mask has 2 entries for 1 tokens"),
        ({"messages": MESSAGES[:1]}, "no token is marked as sampled"),
        ({"messages": MESSAGES[1:]}, "no token stands before the first that was sampled"),
        ({"messages": []}, "no column holds the token ids"),
    ],
)
def test_what_is_no_sequence_is_told(row, error):
    with pytest.raises(ValueError, match=error):
        read_token_log(row)
