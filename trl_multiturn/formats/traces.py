"""Traces of `verifiers` (schema 1, as of its release 0.4): a graph of messages that hold their tokens.

Every path from a root to a leaf is a conversation as the policy saw it; where the history was rewritten in between, a
trace has several. A token stands once, at the message that brought it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def is_trace(row: Mapping[str, Any]) -> bool:
    """Whether a row is a trace of `verifiers`."""
    nodes = row.get("nodes")
    return isinstance(nodes, Sequence) and bool(nodes) and all(_is_node(node) for node in nodes)


def read_trace(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a trace: one per path, whose ids, mask, log-probabilities and reward are those of the trace.

    Args:
        row (`Mapping[str, Any]`):
            A trace's record. What was sampled on several paths is trained on the first alone.

    Yields:
        `dict`: `prompt_ids`, `completion_ids`, `action_mask`, `behavior_logps` where all sampled tokens have one (the
        record rounds them to four decimals, unless it was written with all), `reward`, `trace_id` and `branch`;
        without token ids (an API's traces), `messages`, `tools` and the same.

    Raises:
        `ValueError`: if the trace did not end well or nobody judged it, or its tokens do not belong together.
    """
    if row.get("ok") is False or (row.get("errors") and row.get("ok") is not True):
        raise ValueError("the trace ended in an error, which is the machine's, so its reward says nothing.")
    nodes = row["nodes"]
    origin = {"reward": _reward(row), "trace_id": row.get("id")}
    trained: set[int] = set()
    for branch, path in enumerate(_paths(nodes)):
        if any(node.get("token_ids") for node in nodes):
            tokens = _tokens(nodes, path, trained)
        else:
            tokens = _messages(nodes, path, trained, row.get("tools"))
        trained.update(path)
        if tokens is not None:
            yield {**tokens, **origin, "branch": branch}


def _is_node(node: Any) -> bool:
    return isinstance(node, Mapping) and "parent" in node and isinstance(node.get("message"), Mapping)


def _reward(row: Mapping[str, Any]) -> float:
    rewards = row.get("rewards") or {}
    missing = [name for name, reward in rewards.items() if reward is None]
    if missing or not rewards:
        which = f"its reward {missing[0]!r} was not given" if missing else "it has no reward"
        raise ValueError(f"{which}, so nobody has judged the trace.")
    return sum(float(each["score"]) * float(each.get("weight", 1.0)) for each in rewards.values())


def _paths(nodes: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    """From the root to each leaf; a summary of the history that was not taken up is none."""
    parents = {node["parent"] for node in nodes}
    links = [(at, link) for at, node in enumerate(nodes) for link in node.get("semantic_parents") or ()]
    taken_up = {link["node"] for _, link in links if link["type"] == "compaction"}
    attempts = {at for at, link in links if link["type"] == "compaction_attempt"} - taken_up
    for leaf in range(len(nodes)):
        if leaf not in parents | attempts:
            path, at = [leaf], nodes[leaf]["parent"]
            while at is not None:
                if not 0 <= at < len(nodes) or at in path:
                    raise ValueError(f"message {path[-1]} follows message {at}, which is no path from a root.")
                path.append(at)
                at = nodes[at]["parent"]
            yield path[::-1]


def _tokens(nodes: Sequence[Mapping[str, Any]], path: Sequence[int], trained: set[int]) -> dict[str, Any] | None:
    """A path as a token row; `None` where nothing of it is left to train."""
    ids: list[int] = []
    mask: list[int] = []
    logps: list[float] = []
    scored = True
    for at in path:
        node = nodes[at]
        bits = [int(bit and at not in trained) for bit in node["mask"]]
        sampled, scores = sum(map(bool, node["mask"])), list(node.get("logprobs") or ())
        if len(bits) != len(node["token_ids"]) or len(scores) not in (0, sampled):
            raise ValueError(
                f"message {at} has {len(node['token_ids'])} tokens, {len(bits)} entries in its mask and {len(scores)} "
                f"log-probabilities of {sampled} sampled tokens, so it is unknown which belongs to which."
            )
        scored = scored and (bool(scores) or not sum(bits))
        given = iter(scores or [0.0] * sampled)
        spread = [next(given) if was_sampled else 0.0 for was_sampled in node["mask"]]
        logps += [score if bit else 0.0 for score, bit in zip(spread, bits, strict=True)]
        ids += node["token_ids"]
        mask += bits
    if 1 not in mask:
        return None
    start = mask.index(1)
    if start == 0:
        raise ValueError("no token stands before the first that was sampled, so it has no prompt.")
    row: dict[str, Any] = {"prompt_ids": ids[:start], "completion_ids": ids[start:], "action_mask": mask[start:]}
    return {**row, "behavior_logps": logps[start:]} if scored else row


def _messages(
    nodes: Sequence[Mapping[str, Any]], path: Sequence[int], trained: set[int], tools: Any
) -> dict[str, Any] | None:
    """A path as messages, where the trace holds no tokens."""
    messages = []
    for at in path:
        message = {key: value for key, value in nodes[at]["message"].items() if value is not None}
        message.pop("provider_state", None)
        if message["role"] == "assistant":
            message["train"] = bool(nodes[at].get("sampled")) and at not in trained
        messages.append(message)
    if not any(message.get("train") for message in messages):
        return None
    shown = nodes[path[0]].get("tools") or tools
    return {"messages": messages, **({"tools": shown} if shown else {})}
