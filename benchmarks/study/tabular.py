"""The tabular tool MDP: every loss against the exact optimum, with tools whose answers are certain or drawn.

Here a method's bias shows without a model's or a sample's error: all trajectories are enumerated, each as often as it
occurs, and a softmax table and a table of values are trained until the schedule's end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_multiturn.losses import dqo_policy_loss, dqo_value_loss, oreo_policy_loss, oreo_value_loss, terminal_rewards
from trl_multiturn.tabular import Optimum, Paths, TabularToolMDP


BETA = 0.3
TURNS = 3
TABULAR_WORLDS = ("tabular-certain", "tabular-uncertain")
TABULAR_ARMS = ("m-dpo", "m-dpo-margin", "oreo", "oreo-response", "dqo", "dqo-lam0.95", "dro")
STEPS = 800


def run_tabular(out: Path, world: str, seed: int, arm: str, quick: bool) -> dict[str, Any]:
    """Trains one loss on one random MDP; `world` is `"tabular-certain"` or `"tabular-uncertain"`."""
    if arm not in TABULAR_ARMS:
        raise ValueError(f"{arm!r} is no arm of the tabular worlds. Take one of {', '.join(TABULAR_ARMS)}.")
    torch.set_num_threads(1)
    stochastic = world == "tabular-uncertain"
    mdp = TabularToolMDP.random(TURNS, actions=3, observations=2, stochastic=stochastic, seed=seed)
    paths = mdp.paths()
    if not arm.startswith("m-dpo"):  # M-DPO weighs pairs by chance, the others repeat rows
        paths = paths.repeat_by_chance(4 ** (TURNS - 1) if stochastic else 1)
    optimum, steps = mdp.solve(BETA), 30 if quick else STEPS
    log_policy = _fit(arm, mdp, paths, optimum, steps)
    target = (mdp.reference.log() + optimum.log_ratios).exp()
    distance = 0.5 * (log_policy.exp() - target).abs().sum(dim=-1)
    best, reached = optimum.values[0].item(), _objective(mdp, log_policy)
    start = _objective(mdp, mdp.reference.log())
    return {
        "distance": distance[paths.states.unique()].max().item(),
        "score": (reached - start) / (best - start),
        "steps": steps,
    }


def _objective(mdp: TabularToolMDP, log_policy: Tensor) -> float:
    """`E[R] − β KL(π ‖ π_ref)` of a policy, by backward recursion."""
    ends = mdp.successors[:, :, 0] < 0
    values = torch.zeros(len(mdp.rewards), dtype=mdp.rewards.dtype)
    for _ in range(mdp.turns):
        q_values = torch.where(ends, mdp.rewards, mdp.expected_next(values))
        values = (log_policy.exp() * (q_values - BETA * (log_policy - mdp.reference.log()))).sum(dim=-1)
    return values[0].item()


def _fit(arm: str, mdp: TabularToolMDP, paths: Paths, optimum: Optimum, steps: int) -> Tensor:
    """The log-policy `(S, A)` that an arm's loss ends with."""
    logits = mdp.reference.log().clone().requires_grad_()
    values = torch.zeros(len(mdp.reference), dtype=logits.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (3 * step / steps))
    margins = _luck(mdp, paths, optimum) if arm == "m-dpo-margin" else torch.zeros(len(paths.rewards))
    for _ in range(steps):
        optimizer.zero_grad()
        log_ratios = paths.pick(logits.log_softmax(dim=-1) - mdp.reference.log())
        if arm.startswith("m-dpo"):
            loss = _preference_loss(log_ratios, margins, paths)
        else:
            loss = _value_losses(arm, values[paths.states], log_ratios, paths.rewards)
        loss.backward()
        optimizer.step()
        schedule.step()
    return logits.detach().log_softmax(dim=-1)


def _luck(mdp: TabularToolMDP, paths: Paths, optimum: Optimum) -> Tensor:
    """Term C of eq. 11 from the exact values: how much better than expected each path's observations were, `(P,)`."""
    values = optimum.values[paths.states]
    expected = paths.pick(mdp.expected_next(optimum.values))
    return (values[:, 1:] - expected[:, :-1]).sum(dim=1)


def _preference_loss(log_ratios: Tensor, margins: Tensor, paths: Paths) -> Tensor:
    """M-DPO's loss (TRL's sigmoid with the margin inside) over all pairs, each with its Bradley–Terry preference."""
    scores = BETA * log_ratios.sum(dim=1) + margins
    gaps = scores.unsqueeze(1) - scores.unsqueeze(0)
    preferred = (paths.rewards.unsqueeze(1) - paths.rewards.unsqueeze(0)).sigmoid()
    losses = -(preferred * F.logsigmoid(gaps) + (1 - preferred) * F.logsigmoid(-gaps))
    weights = paths.chances.unsqueeze(1) * paths.chances.unsqueeze(0)
    return (weights * losses).sum() / weights.sum()


def _value_losses(arm: str, values: Tensor, log_ratios: Tensor, rewards: Tensor) -> Tensor:
    """The package's value and policy losses; every column is an action."""
    mask = torch.ones_like(values)
    if arm.startswith("oreo"):
        arguments = (values, log_ratios, rewards, mask, BETA)
        level: Literal["response", "token"] = "response" if arm == "oreo-response" else "token"
        return oreo_value_loss(*arguments) + oreo_policy_loss(*arguments, level)
    if arm == "dro":  # the whole path is one action
        values, log_ratios, mask = values[:, :1], log_ratios.sum(dim=1, keepdim=True), mask[:, :1]
    returns = (values, log_ratios, terminal_rewards(rewards, mask), mask, BETA, 0.95 if arm == "dqo-lam0.95" else 1.0)
    return dqo_value_loss(*returns) + dqo_policy_loss(*returns)
