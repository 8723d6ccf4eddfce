"""Episodes per second and per second of processor time: this package's pool beside TRL's handling of environments.

```bash
python -m benchmarks.environments                      # an environment that computes in Python
python -m benchmarks.environments --alfworld --episodes 64 --arms 64 --rounds 3
```

The first arm plays as `GRPOTrainer` 1.16 handles environments: instances that are made once, reset one after the
other, and called one after the other in lock-step over the turns, all in the trainer's process. (Its loop is a part of
the trainer and cannot be called without a model; the same calls are made here in the same order.) The policy is a
script in all arms, so that what is measured is the environments and what is around them. Arms take turns in rounds;
a ratio is the median over rounds of one round's two arms.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_multiturn import EnvironmentPool, RolloutConfig, ScriptedEngine, generate_trajectories


STEPS = 8


class Puzzle:
    """An environment that computes in Python, as most do, and so holds the interpreter's lock."""

    reusable = True

    def reset(self, **row: Any) -> str:
        self.steps = 0
        return "Go on."

    def act(self, command: str) -> str:
        """
        Computes.

        Args:
            command: Anything.
        """
        self.steps += 1
        return str(sum(i * i % 7 for i in range(200_000)))

    @property
    def done(self) -> bool:
        return self.steps >= STEPS

    def get_reward(self) -> float:
        return 1.0


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(name: str, episodes: int, play: Callable[[], int]) -> dict[str, Any]:
    wall, processor = time.perf_counter(), processor_seconds()
    played = play()
    wall, processor = time.perf_counter() - wall, processor_seconds() - processor
    assert played == episodes, f"{name}: {played} of {episodes} episodes ended well"
    row = {
        "arm": name,
        "episodes": episodes,
        "per_second": episodes / wall,
        "per_processor_second": episodes / processor,
    }
    print(f"{name:34} {episodes / wall:8.2f} episodes/s {episodes / processor:8.2f} per s of processor", flush=True)
    return row


def play_as_trl(factory: Callable[[], Any], rows: list[dict[str, Any]], script: Callable[[int, int], str]) -> int:
    environments = [factory() for _ in rows]
    for environment, row in zip(environments, rows, strict=True):
        environment.reset(**row)
    turn, live = 0, list(range(len(rows)))
    while live:
        for index in live:
            environments[index].act(script(index, turn))
        live = [index for index in live if not environments[index].done]
        turn += 1
    return sum(environment.get_reward() == 1.0 for environment in environments)


def play_here(factory: Any, rows: list[dict[str, Any]], script: Callable[[int, int], str]) -> int:
    from tests.support import byte_tokenizer

    def sample(prompt_text: str, sampling: Any, session: str) -> str:
        turn = prompt_text.count("<|im_start|>assistant") - 1
        return f"Action: {script(int(session.split('/')[2]), turn)}"

    config = RolloutConfig(
        dialect="action", num_generations=1, max_tool_calling_iterations=40, max_trajectory_tokens=32768
    )
    config.tool_timeout_seconds = None
    engine = ScriptedEngine(sample, byte_tokenizer("qwen2_5"))
    trajectories = generate_trajectories(rows, engine, environment_factory=factory, config=config, progress=False)
    return sum(trajectory.reward == 1.0 for trajectory in trajectories)


def load(arguments: argparse.Namespace) -> tuple[Callable[[], Any], list[dict[str, Any]], Callable[[int, int], str]]:
    prompt = [{"role": "user", "content": "Play. "}]
    if not arguments.alfworld:
        return Puzzle, [{"prompt": prompt}] * arguments.episodes, lambda index, turn: "go on"
    from trl_multiturn.tools import ALFWorldEnvironment, make_alfworld_games

    games = make_alfworld_games(arguments.games, range(12), furniture=0.4, num_things=6, num_rooms=6)
    rows = [games[index % len(games)] for index in range(arguments.episodes)]
    return ALFWorldEnvironment, rows, lambda index, turn: rows[index]["walkthrough"][turn]


def print_ratios(results: Sequence[dict[str, Any]], arms: int) -> None:
    """Each arm beside the first of its round."""
    for arm in range(1, arms):
        for rate in ("per_second", "per_processor_second"):
            ratios = [row[rate] / first[rate] for first, row in zip(results[::arms], results[arm::arms], strict=True)]
            print(f"{results[arm]['arm']:34} {rate:21} {statistics.median(ratios):.2f} x (of {len(ratios)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alfworld", action="store_true", help="ALFWorld's engine, by the planner's commands")
    parser.add_argument("--games", default="outputs/alfworld_games", help="where ALFWorld's games are kept")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--arms", nargs="*", help="how many environments at most, in processes: 1 2 64")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    factory, rows, script = load(arguments)
    count = arguments.episodes
    arms = {"TRL's handling, one process": lambda: play_as_trl(factory, rows, script)}
    pools = [("process", 1), ("process", 2), ("process", count)]
    if arguments.arms:
        pools = [("process", int(most)) for most in arguments.arms]
    for isolation, most in pools if arguments.alfworld else [("thread", count), *pools]:

        def play(isolation: str = isolation, most: int = most) -> int:
            with EnvironmentPool(functools.partial(factory), most, isolation=isolation) as pool:  # type: ignore[arg-type]
                return play_here(pool, rows, script)

        arms[f"pool, {isolation}, {most} at most"] = play
    print(f"{count} episodes, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    results = [measure(name, count, play) for _ in range(arguments.rounds) for name, play in arms.items()]
    print_ratios(results, len(arms))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
