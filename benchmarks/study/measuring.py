"""What is measured of a policy: held-out success, and what one wants to know beside it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from trl.trainer.utils import selective_log_softmax

from .arms import Arm
from .settings import Setting


HELD_OUT_SEED = 0  # the same held-out prompts for every arm and seed


def measure(arm: Arm, policy: Any, trainer: Any, start: Any, tokenizer: Any, setting: Setting) -> dict[str, float]:
    """
    Evaluates an arm on the world's held-out prompts.

    Returns:
        `score` and `score_se` (mean reward of greedy decoding), `sampled` (of one sample at temperature 1), `length`,
        `tool_calls`, `tool_errors` and `kl` of those samples; pass@n and searches where the arm asks for them.
    """
    from trl_multiturn import TransformersEngine, evaluate_policy
    from trl_multiturn.evaluation import Estimate, EvaluationResult

    policy.eval()
    engine = TransformersEngine(policy, tokenizer)
    prompts = setting.problems(setting.sizes.held_out, HELD_OUT_SEED, "test")
    arguments = {**setting.tools(fair=True), "config": setting.rollout_config(0), "progress": False}

    def evaluate(rows: Any, **options: Any) -> EvaluationResult:
        return evaluate_policy(rows, engine, **arguments, **options)

    if arm.samples or arm.widths:
        few = prompts.select(range(min(setting.sizes.many, len(prompts))))
        return _sampled(arm, few, evaluate) if arm.samples else _searched(arm, few, evaluate, trainer, setting)
    greedy = Estimate.of(trajectory.reward for trajectory in evaluate(prompts).trajectories)
    return {"score": greedy.value, "score_se": greedy.standard_error, **_character(prompts, engine, arguments, start)}


def _character(prompts: Any, engine: Any, arguments: dict[str, Any], start: Any) -> dict[str, float]:
    """Of one sample at temperature 1 for up to 100 prompts."""
    from trl_multiturn import generate_trajectories

    some = prompts.select(range(min(100, len(prompts))))
    samples = generate_trajectories(some, engine, num_generations=1, **arguments)
    count = len(samples)
    calls = sum(trajectory.info["tool_calls"] for trajectory in samples)
    errors = sum(trajectory.info["tool_errors"] for trajectory in samples)
    return {
        "sampled": sum(trajectory.reward or 0.0 for trajectory in samples) / count,
        "length": sum(sum(trajectory.action_mask) for trajectory in samples) / count,
        "tool_calls": calls / count,
        "tool_errors": errors / max(calls, 1),
        "kl": sum(sum(trajectory.logps or []) for trajectory in samples) / count - _log_likelihood(start, samples),
    }


@torch.no_grad()
def _log_likelihood(model: Any, trajectories: list[Any], batch_size: int = 50) -> float:
    """Mean over trajectories of the summed log-probability of the sampled tokens, in nats."""
    model.eval()
    total = 0.0
    for begin in range(0, len(trajectories), batch_size):
        batch = trajectories[begin : begin + batch_size]
        ids = [torch.tensor(t.prompt_ids + t.completion_ids) for t in batch]
        mask = [torch.tensor([0] * len(t.prompt_ids) + t.action_mask) for t in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        sampled = torch.nn.utils.rnn.pad_sequence(mask, batch_first=True)[:, 1:].bool()
        logps = selective_log_softmax(model(padded).logits[:, :-1], padded[:, 1:])
        total += logps[sampled].sum().item()
    return total / len(trajectories)


def _sampled(arm: Arm, prompts: Any, evaluate: Any) -> dict[str, float]:
    """pass@n for powers of two."""
    metrics = evaluate(prompts, n=arm.samples, temperature=0.7).metrics()
    return {name: value for name, value in metrics.items() if not name.endswith("_se")}


def _searched(arm: Arm, prompts: Any, evaluate: Any, trainer: Any, setting: Setting) -> dict[str, float]:
    """Greedy decoding beside searches that the arm's values guide."""
    from trl_multiturn import value_guided_search

    values = trainer.value_model.standing_on(trainer.accelerator.unwrap_model(trainer.model))
    result = {"score": evaluate(prompts).pass_at_1}
    for width in arm.widths:
        kind = {"beam": width} if setting.world is None else {"beam": 1, "candidates": width}
        search = functools.partial(value_guided_search, score=values.score, **kind)
        result[f"width_{width}"] = evaluate(prompts, search=search).pass_at_1
    return result
