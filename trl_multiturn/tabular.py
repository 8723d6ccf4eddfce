"""
A tool-using agent small enough to solve exactly: a place to check a loss, or to learn what it converges to.

States are whole histories `(a_1, o_1, …, a_h, o_h)`, so there are no shared states and no discounting. The optimum of
`E[R] − β KL(π ‖ π_ref)` follows from backward recursion (M-DPO, https://huggingface.co/papers/2409.02392, eqs. 6–7).

```python
>>> mdp = TabularToolMDP.random(turns=2, actions=3, observations=2, stochastic=True, seed=0)
>>> optimum = mdp.solve(beta=0.5)
>>> paths = mdp.paths()
>>> residual = optimum.residuals(paths)  # V(s_h) − (r_h − β log π*/π_ref + V(s_{h+1})), zero where tools are certain
```
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Paths:
    """
    Every trajectory of an MDP once; `P` of them, `H` turns each.

    Args:
        states (`Tensor`): `(P, H)` int64, the state in which each turn's action is chosen.
        actions (`Tensor`): `(P, H)` int64.
        rewards (`Tensor`): `(P,)`, terminal.
        chances (`Tensor`): `(P,)`, probability of the path's observations given its actions; multiply by a policy's
            probability of the actions to get the probability of the path.
    """

    states: Tensor
    actions: Tensor
    rewards: Tensor
    chances: Tensor

    def pick(self, table: Tensor) -> Tensor:
        """Entries of a `(S, A)` table at the paths' states and actions, `(P, H)`."""
        return table[self.states, self.actions]

    def repeat_by_chance(self, denominator: int) -> Paths:
        """
        Repeat each path `chances * denominator` times, so that a plain mean over rows weighs observations rightly.

        Raises:
            `ValueError`: if a chance is no multiple of `1 / denominator`.
        """
        counts = self.chances * denominator
        if not torch.allclose(counts, counts.round()):
            raise ValueError(
                f"Some chances are no multiples of 1/{denominator}, so whole repetitions cannot represent them. Pass "
                "the common denominator of the paths' chances."
            )
        counts = counts.round().long()
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        return Paths(self.states[rows], self.actions[rows], self.rewards[rows], self.chances[rows])


@dataclass(frozen=True)
class Optimum:
    """The soft optimum: `log_ratios` `(S, A)` = log π*/π_ref, `values` `(S,)`, `q_values` `(S, A)`, and its β."""

    log_ratios: Tensor
    values: Tensor
    q_values: Tensor
    beta: float

    def residuals(self, paths: Paths) -> Tensor:
        """`V(s_h) − (r_h − β log π*/π_ref + V(s_{h+1}))` along each path, `(P, H)`; r only at the end."""
        values = self.values[paths.states]
        following = torch.cat([values[:, 1:], paths.rewards.unsqueeze(1)], dim=1)
        return values + self.beta * paths.pick(self.log_ratios) - following


@dataclass(frozen=True)
class TabularToolMDP:
    """
    A finite tool-using agent.

    Args:
        reference (`Tensor`): `(S, A)`, π_ref(a | s) > 0.
        observation_probs (`Tensor`): `(S, A, O)`, probability of each observation after an action; unused where the
            episode has ended.
        successors (`Tensor`): `(S, A, O)` int64, the next state, −1 where the action is the episode's last.
        rewards (`Tensor`): `(S, A)`, paid where the action is the episode's last.
        turns (`int`): `H`, the number of actions of an episode.
    """

    reference: Tensor
    observation_probs: Tensor
    successors: Tensor
    rewards: Tensor
    turns: int

    @classmethod
    def random(
        cls, turns: int = 3, actions: int = 3, observations: int = 2, stochastic: bool = False, seed: int = 0
    ) -> TabularToolMDP:
        """
        Draw reference, tools and rewards at random, in float64.

        With `stochastic=False` each action has one certain observation. Otherwise two of the observations have
        probabilities 1/4 and 3/4, so that four repetitions per tool call represent the chances exactly.
        """
        generator = torch.Generator().manual_seed(seed)
        branching = actions * observations
        depth_sizes = [branching**depth for depth in range(turns)]
        count = sum(depth_sizes)
        reference = torch.randn(count, actions, generator=generator, dtype=torch.float64).softmax(dim=-1)
        rewards = torch.rand(count, actions, generator=generator, dtype=torch.float64)
        order = torch.rand(count, actions, observations, generator=generator).argsort(dim=-1)
        chances = torch.zeros(observations, dtype=torch.float64)
        chances[:2] = torch.tensor([0.75, 0.25] if stochastic else [1.0, 0.0], dtype=torch.float64)[:observations]

        successors = torch.full((count, actions, observations), -1)
        inner = sum(depth_sizes[:-1])  # states are numbered by depth, children in the order of their parents
        successors[:inner] = torch.arange(1, 1 + inner * branching).view(inner, actions, observations)
        return cls(reference, chances[order], successors, rewards, turns)

    def expected_next(self, values: Tensor) -> Tensor:
        """`E_o V(s')` after each action, `(S, A)`; 0 after the last one."""
        following = torch.where(self.successors >= 0, values[self.successors.clamp(min=0)], 0.0)
        return (self.observation_probs * following).sum(dim=-1)

    def solve(self, beta: float) -> Optimum:
        """`V(s) = β log E_{π_ref} exp(Q(s, a) / β)` and `π*(a|s) ∝ π_ref(a|s) exp(Q(s, a) / β)`, from the end back."""
        is_last = self.successors[:, :, 0] < 0
        values = torch.zeros(len(self.rewards), dtype=self.rewards.dtype)
        for _ in range(self.turns):  # after h sweeps the states of the last h turns are exact
            q_values = torch.where(is_last, self.rewards, self.expected_next(values))
            values = beta * (self.reference.log() + q_values / beta).logsumexp(dim=-1)
        return Optimum((q_values - values.unsqueeze(1)) / beta, values, q_values, beta)

    def paths(self) -> Paths:
        """Every trajectory whose observations have a positive probability."""
        states, actions, rewards, chances = [], [], [], []

        def walk(state: int, path_states: list[int], path_actions: list[int], chance: float) -> None:
            for action in range(self.reference.size(1)):
                so_far = [*path_states, state], [*path_actions, action]
                if self.successors[state, action, 0] < 0:
                    states.append(so_far[0])
                    actions.append(so_far[1])
                    rewards.append(self.rewards[state, action].item())
                    chances.append(chance)
                    continue
                for observation, probability in enumerate(self.observation_probs[state, action].tolist()):
                    if probability > 0:
                        walk(int(self.successors[state, action, observation]), *so_far, chance * probability)

        walk(0, [], [], 1.0)
        floats = (torch.tensor(x, dtype=torch.float64) for x in (rewards, chances))
        return Paths(torch.tensor(states), torch.tensor(actions), *floats)

    def surprise(self, paths: Paths, values: Tensor, draws: int | None = None, seed: int = 0) -> Tensor:
        r"""
        Term C of M-DPO's eq. 11 for each path, $\sum_h [V(s_{h+1}) - E_o V(s_{h+1})]$, `(P,)`.

        Args:
            paths ([`Paths`]): the trajectories.
            values (`Tensor`): `(S,)`, values of all states, exact or learned.
            draws (`int`, *optional*): estimate the expectation by this many redrawn observations per call, as one
                must with real tools; exact where absent.
            seed (`int`, *optional*, defaults to 0): of the draws.
        """
        expected = paths.pick(self.expected_next(values))[:, :-1]
        if draws is not None:
            generator = torch.Generator().manual_seed(seed)
            probs = self.observation_probs[paths.states[:, :-1], paths.actions[:, :-1]]
            drawn = torch.multinomial(probs.flatten(0, 1), draws, replacement=True, generator=generator)
            successors = self.successors[paths.states[:, :-1], paths.actions[:, :-1]].flatten(0, 1)
            expected = values[successors.gather(1, drawn)].mean(dim=1).view_as(expected)
        return (values[paths.states[:, 1:]] - expected).sum(dim=1)
