"""
What each objective converges to: trained on an agent that is solved exactly, its distance to the optimum.

    python -m benchmarks.objectives            # prints the table; a few minutes
    python -m benchmarks.objectives --write    # and writes it, with the figure, into docs/

Every objective has all trajectories of a random tool-using agent as data (`trl_multiturn.tabular`), each as often as
the tools give its answers, a softmax policy with a number per state and action, and Adam. So what is left is the
objective's own: no sampling noise, no network. The distance is the largest total variation to π* over the states that
can occur.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_multiturn.losses import (
    dqo_policy_loss,
    dqo_value_loss,
    group_means,
    group_regression_loss,
    group_soft_means,
    group_variance_loss,
    merge_segments,
    oreo_policy_loss,
    oreo_value_loss,
    outcome_classification_loss,
    soft_value,
    terminal_rewards,
    turn_ids,
)
from trl_multiturn.tabular import Optimum, Paths, TabularToolMDP


BETA = 0.3
SEEDS = (3, 4, 5)
DMPO_DISCOUNT = 0.9


@dataclass(frozen=True)
class World:
    """
    Several agents side by side, so that one training serves all seeds: their states have numbers of their own.

    Args:
        mdps (`list[TabularToolMDP]`): the agents.
        optima (`list[Optimum]`): of each.
        once (`Paths`): every trajectory of every agent; `chances` weigh them.
        rows (`Paths`): the same, each as often as the tools' answers come.
        owner_once, owner_rows (`Tensor`): the agent of each; its trajectories are a group.
        surprise (`Tensor`): term C of each of `rows`, the exact observation margin; `surprise_once` of `once`.
        log_reference (`Tensor`): `(S, A)`.
    """

    mdps: list[TabularToolMDP]
    optima: list[Optimum]
    once: Paths
    rows: Paths
    owner_once: Tensor
    owner_rows: Tensor
    surprise: Tensor
    surprise_once: Tensor
    log_reference: Tensor

    @classmethod
    def random(cls, stochastic: bool, turns: int = 3, seeds: tuple[int, ...] = SEEDS, outcomes: bool = False) -> World:
        """`outcomes`: rewards of 1 and 0, and a reference that takes all actions alike, so that `rows` are its own."""
        mdps = [TabularToolMDP.random(turns, 3, 2, stochastic, seed) for seed in seeds]
        if outcomes:
            mdps = [_with_outcomes(mdp) for mdp in mdps]
        optima = [mdp.solve(BETA) for mdp in mdps]
        single = [mdp.paths() for mdp in mdps]
        repeated = [paths.repeat_by_chance(4 ** (turns - 1) if stochastic else 1) for paths in single]
        surprises = [
            [mdp.surprise(paths, optimum.values) for mdp, optimum, paths in zip(mdps, optima, several, strict=True)]
            for several in (repeated, single)
        ]
        return cls(
            mdps,
            optima,
            *(_side_by_side(several, len(mdps[0].reference)) for several in (single, repeated)),
            *(_owners(several) for several in (single, repeated)),
            *(torch.cat(several) for several in surprises),
            torch.cat([mdp.reference for mdp in mdps]).log(),
        )

    def distances(self, logits: Tensor) -> list[float]:
        """Of each agent's policy to its optimum."""
        output = []
        parts = logits.softmax(dim=-1).split(len(self.mdps[0].reference))
        for mdp, optimum, policy in zip(self.mdps, self.optima, parts, strict=True):
            target = (mdp.reference.log() + optimum.log_ratios).exp()
            states = mdp.paths().states.unique()
            output.append((0.5 * (policy - target).abs().sum(dim=-1))[states].max().item())
        return output


def _with_outcomes(mdp: TabularToolMDP) -> TabularToolMDP:
    """The best last action earns 1; where the actions are good on average, all do; the others earn 0."""
    rewards = mdp.rewards
    bar = torch.where(rewards.mean(dim=1) > 0.5, rewards.min(dim=1).values, rewards.max(dim=1).values)
    good = (rewards >= bar.unsqueeze(1)).to(rewards.dtype)
    return replace(mdp, reference=torch.full_like(mdp.reference, 1 / mdp.reference.size(1)), rewards=good)


def _side_by_side(several: list[Paths], states: int) -> Paths:
    return Paths(
        torch.cat([paths.states + i * states for i, paths in enumerate(several)]),
        *(torch.cat([getattr(paths, name) for paths in several]) for name in ("actions", "rewards", "chances")),
    )


def _owners(several: list[Paths]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(several)), torch.tensor([len(p.rewards) for p in several]))


class Tabular:
    """A softmax policy and a value for every state; it starts at the reference and at V = 0."""

    def __init__(self, world: World):
        self.world = world
        self.logits = world.log_reference.clone().requires_grad_()
        self.values = torch.zeros(len(self.logits), dtype=torch.float64, requires_grad=True)

    def log_ratios(self, paths: Paths) -> Tensor:
        """`(P, H)`."""
        return paths.pick(self.logits.log_softmax(dim=-1) - self.world.log_reference)

    def train(self, loss_of: Callable[[Tabular], Tensor], steps: int) -> Tabular:
        optimizer = torch.optim.Adam([self.logits, self.values], lr=0.2, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (3 * step / steps))
        # Adam's step does not depend on the scale; a mean over three agents is as good as one
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(self).backward()
            optimizer.step()
            schedule.step()
        return self


# --- objectives; a turn is one action, so "token" and "turn" are the same here ---------------------------------------


def m_dpo(model: Tabular, margin: bool = False, discount: float | None = None) -> Tensor:
    """Over all pairs of an agent's trajectories, each preferred as often as Bradley and Terry say."""
    world, paths = model.world, model.world.once
    log_ratios = model.log_ratios(paths)
    if discount is not None:  # DMPO (https://huggingface.co/papers/2406.14868), eq. 13
        turns = torch.arange(log_ratios.size(1))
        log_ratios = log_ratios * (1 - discount ** (log_ratios.size(1) - turns)) / (1 - discount ** log_ratios.size(1))
    scores = BETA * log_ratios.sum(dim=1) + (world.surprise_once if margin else 0.0)
    gaps = scores.unsqueeze(1) - scores.unsqueeze(0)
    preferred = (paths.rewards.unsqueeze(1) - paths.rewards.unsqueeze(0)).sigmoid()
    losses = -(preferred * F.logsigmoid(gaps) + (1 - preferred) * F.logsigmoid(-gaps))
    return _mean_over_pairs(losses, world)


def m_kto(model: Tabular) -> Tensor:
    """Trajectories labelled good as often as their reward says."""
    paths = model.world.rows
    scores = model.log_ratios(paths).sum(dim=1)
    zero = group_means(scores.detach(), model.world.owner_rows).clamp(min=0)
    lift = (BETA * (scores - zero)).sigmoid()
    return (paths.rewards * (1 - lift) + (1 - paths.rewards) * lift).mean()


def oreo(model: Tabular, level: str) -> Tensor:
    tensors = _trainer_tensors(model)
    ids = turn_ids(tensors[3]) if level == "step" else None
    return oreo_value_loss(*tensors, BETA) + oreo_policy_loss(*tensors, BETA, level, ids)


def dqo(model: Tabular, lam: float = 1.0, response: bool = False) -> Tensor:
    values, log_ratios, rewards, mask = _trainer_tensors(model)
    tensors = (values, log_ratios, terminal_rewards(rewards, mask), mask)
    if response:
        merged = merge_segments(*tensors, torch.zeros_like(mask, dtype=torch.long))
        tensors = (merged.values, merged.log_ratios, merged.rewards, merged.action_mask)
    return dqo_value_loss(*tensors, BETA, lam) + dqo_policy_loss(*tensors, BETA, lam)


def by_classification(model: Tabular, loss: str) -> Tensor:
    """The value model's numbers are log-odds of the reward 1; the policy loss reads the soft value of that chance."""
    logits, log_ratios, rewards, mask = _trainer_tensors(model)
    tensors = (soft_value(logits, BETA), log_ratios)
    if loss == "oreo":
        policy_loss = oreo_policy_loss(*tensors, rewards, mask, BETA)
    else:
        policy_loss = dqo_policy_loss(*tensors, terminal_rewards(rewards, mask), mask, BETA)
    return outcome_classification_loss(logits, rewards, mask) + policy_loss


def tbrm(model: Tabular) -> Tensor:
    """
    TBRM (https://huggingface.co/papers/2505.15311): the policy's logits are its Q-values, so that their soft maximum
    at the prompt is its value, and the Bellman residuals of a trajectory, summed, are that value's.
    """
    paths = model.world.rows
    start = BETA * model.logits[paths.states[:, 0]].logsumexp(dim=-1)
    return (start + BETA * model.log_ratios(paths).sum(dim=1) - paths.rewards).square().mean()


def group_regression(model: Tabular, baseline: str, margin: bool = False) -> Tensor:
    world = model.world
    returns = world.rows.rewards - (world.surprise if margin else 0.0)
    log_ratios = model.log_ratios(world.rows)
    if baseline == "variance":
        return group_variance_loss(log_ratios, returns, world.owner_rows, torch.ones_like(log_ratios), BETA)
    if baseline == "mean":
        baselines = group_means(returns, world.owner_rows)
    else:
        baselines = _value_of_reference_samples(world, returns)
    return group_regression_loss(log_ratios, returns, baselines, torch.ones_like(log_ratios), BETA)


def step_regression(model: Tabular) -> Tensor:
    """REFUEL on soft returns: two actions from one state, and what their trajectories earned afterwards."""
    world, paths = model.world, model.world.once
    scaled = BETA * model.log_ratios(paths)
    total = 0.0
    for turn in range(scaled.size(1)):
        togo = paths.rewards - scaled[:, turn + 1 :].sum(dim=1).detach()
        residuals = scaled[:, turn] - togo
        here, action = paths.states[:, turn], paths.actions[:, turn]
        pairs = (here.unsqueeze(1) == here) & (action.unsqueeze(1) != action)
        total = total + _mean_over_pairs((residuals.unsqueeze(1) - residuals).square() * pairs, world)
    return total


def _mean_over_pairs(losses: Tensor, world: World) -> Tensor:
    chances = world.once.chances
    weights = chances.unsqueeze(1) * chances * (world.owner_once.unsqueeze(1) == world.owner_once)
    return (weights * losses).sum() / weights.sum()


def _value_of_reference_samples(world: World, returns: Tensor) -> Tensor:
    """The soft mean of a group that the reference sampled: each trajectory as often as it would."""
    weights = world.rows.pick(world.log_reference).sum(dim=1)
    # log Σ p exp(R/β) with p over the rows of a group, as the soft mean of R + β log (N p)
    normal = group_soft_means(weights, world.owner_rows, 1.0)
    return group_soft_means(returns + BETA * (weights - normal), world.owner_rows, BETA)


def _trainer_tensors(model: Tabular) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As trainers see them: `a_1 o_1 a_2 o_2 a_3`, observation columns masked and full of junk."""
    paths = model.world.rows
    mask = torch.zeros(len(paths.states), 2 * paths.states.size(1) - 1)
    mask[:, ::2] = 1
    laid_out = []
    for per_action in (model.values[paths.states], model.log_ratios(paths)):
        columns = per_action.new_full(mask.shape, float("nan"))
        columns[:, ::2] = per_action
        laid_out.append(columns)
    return laid_out[0], laid_out[1], paths.rewards, mask


@dataclass(frozen=True)
class Objective:
    """A row of the table: its name, what it is called in the package, and its loss."""

    name: str
    where: str
    loss: Callable[[Tabular], Tensor]
    outcomes: bool = False  # on agents whose rewards are 1 and 0


_CLASSIFIED = '… `value_objective="classification"`'
OBJECTIVES = [
    Objective("M-DPO", "`MultiTurnDPOTrainer`", m_dpo),
    Objective("M-DPO with the observation margin", "… with a `margin`", lambda m: m_dpo(m, margin=True)),
    Objective("M-KTO", "`MultiTurnKTOTrainer`", m_kto),
    Objective("OREO, tokens", '`OREOTrainer`, `level="token"`', lambda m: oreo(m, "token")),
    Objective("OREO, turns", '… `level="step"`', lambda m: oreo(m, "step")),
    Objective("OREO, response", '… `level="response"`', lambda m: oreo(m, "response")),
    Objective("DQO, λ = 1", "`DQOTrainer`", dqo),
    Objective("DQO, λ = 0.95", "… `lam=0.95`", lambda m: dqo(m, 0.95)),
    Objective("OREO, values by classification", _CLASSIFIED, lambda m: by_classification(m, "oreo"), outcomes=True),
    Objective("DQO, values by classification", _CLASSIFIED, lambda m: by_classification(m, "dqo"), outcomes=True),
    Objective("DRO", '… `horizon="response"`', lambda m: dqo(m, response=True)),
    Objective("AGRO", "`GroupRegressionTrainer`", lambda m: group_regression(m, "variance")),
    Objective("AGRO with the margin", "… with a `margin`", lambda m: group_regression(m, "variance", True)),
    Objective("A*-PO, OAPL", '… `baseline="soft_mean"`', lambda m: group_regression(m, "soft_mean")),
    Objective("A*-PO, OAPL with the margin", "… with a `margin`", lambda m: group_regression(m, "soft_mean", True)),
    Objective("group mean", '… `baseline="mean"`', lambda m: group_regression(m, "mean")),
    Objective("REFUEL, soft returns", "`StepRegressionTrainer`", step_regression),
    Objective("TBRM", "not in the package", tbrm),
    Objective("DMPO's weights", "not in the package", lambda m: m_dpo(m, discount=DMPO_DISCOUNT)),
]


def measure(turns: int = 3, steps: int = 800) -> dict[str, tuple[list[float], list[float]]]:
    """Distances to π* by objective, with certain and with uncertain tools, one number per seed."""
    worlds = {
        outcomes: [World.random(stochastic, turns, outcomes=outcomes) for stochastic in (False, True)]
        for outcomes in (False, True)
    }
    results = {}
    for objective in OBJECTIVES:
        certain, uncertain = (
            world.distances(Tabular(world).train(objective.loss, steps).logits.detach())
            for world in worlds[objective.outcomes]
        )
        results[objective.name] = (certain, uncertain)
    return results


# --- report ----------------------------------------------------------------------------------------------------------


def table(results: dict[str, tuple[list[float], list[float]]]) -> str:
    lines = ["| objective | in the package | certain tools | uncertain tools |", "| --- | --- | --- | --- |"]
    for objective in OBJECTIVES:
        certain, uncertain = (", ".join(f"{x:.3f}" for x in distances) for distances in results[objective.name])
        lines.append(f"| {objective.name} | {objective.where} | {certain} | {uncertain} |")
    return "\n".join(lines)


def figure(results: dict[str, tuple[list[float], list[float]]]) -> str:
    """A bar for each objective and kind of tools: the mean over seeds, and a tick for each seed."""
    left, width, row, top = 230, 460, 30, 40
    height = top + row * len(results) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 70} {height}" font-family="sans-serif" '
        'font-size="12"><title>Distance to the optimal policy, by objective</title>',
        f'<rect width="{left + width + 70}" height="{height}" fill="white"/>',
        f'<rect x="{left}" y="12" width="12" height="12" fill="#4477aa"/><text x="{left + 18}" y="22">certain tools'
        f'</text><rect x="{left + 120}" y="12" width="12" height="12" fill="#ee6677"/><text x="{left + 138}" y="22">'
        "uncertain tools</text>",
    ]
    for number, (name, pair) in enumerate(results.items()):
        y = top + row * number
        parts.append(f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{name}</text>')
        for k, (distances, color) in enumerate(zip(pair, ("#4477aa", "#ee6677"), strict=True)):
            length, y_bar = width * sum(distances) / len(distances) + 1, y + 2 + 11 * k
            parts.append(f'<rect x="{left}" y="{y_bar}" width="{length:.1f}" height="9" fill="{color}"/>')
            parts += [
                f'<path d="M{left + width * distance:.1f} {y_bar - 1}v11" stroke="#222"/>' for distance in distances
            ]
    axis = height - 24
    parts.append(f'<line x1="{left}" x2="{left + width}" y1="{axis}" y2="{axis}" stroke="#222"/>')
    for tenth in range(0, 11, 2):
        x = left + width * tenth / 10
        parts.append(f'<text x="{x:.0f}" y="{axis + 16}" text-anchor="middle">{tenth / 10:.1f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/objectives.svg and the table of its page")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(arguments.turns, arguments.steps)
    print(table(results))
    if arguments.write:
        docs = Path(__file__).parents[1] / "docs"
        (docs / "objectives.svg").write_text(figure(results), encoding="utf-8")
        page = (docs / "objectives.md").read_text(encoding="utf-8")
        before, _, rest = page.partition("<!-- measured -->\n")
        after = rest.partition("<!-- end -->")[2]
        command = f"python -m benchmarks.objectives --write --turns {arguments.turns} --steps {arguments.steps}"
        measured = f"{table(results)}\n\n`{command}`, {datetime.date.today()}.\n"
        page = f"{before}<!-- measured -->\n{measured}<!-- end -->{after}"
        (docs / "objectives.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
