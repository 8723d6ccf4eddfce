"""A whole training run, killed with SIGKILL at any moment and started again by the same call, ends as if undisturbed.

`TRL_MULTITURN_KILLS=20 pytest tests/test_killed_run.py -s` kills each kind of run 20 times and prints what was being
done.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk

from tests.killed_run import ITERATIONS
from tests.launch import accelerate_launch, run as launch
from trl_multiturn.online.report import load_reports
from trl_multiturn.rollout import Journal


ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("TRL_MULTITURN_KILLS", "2"))

pytestmark = pytest.mark.slow


class Runner:
    """Starts runs in processes forked from one that has imported everything, and kills them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = open(folder / "log.txt", "w+")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.killed_run"],
            **dict(cwd=ROOT, env=environment, text=True, bufsize=1),
            **dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log),
        )

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait(60)
        self.log.close()

    def run(
        self, folder: Path, kill: tuple[int, float] | None = None, processes: int = 1, **arguments: Any
    ) -> tuple[list, bool]:
        """Runs to the end, or kills all processes of the run so many seconds after its event of this number.

        Returns:
            The events (when, in seconds, a file was touched, and which), and whether the run was killed.
        """
        pipe = self.folder / "events"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
        arguments |= {"folder": str(folder), "pipe": str(pipe), "processes": processes}
        self.server.stdin.write(json.dumps(arguments) + "\n")
        started = json.loads(self.server.stdout.readline())
        events: list[tuple[float, str]] = []

        def follow() -> None:
            with open(pipe) as lines:
                for line in lines:
                    when, _, path = line.rstrip("\n").partition(" ")
                    events.append((float(when), path))
                    if kill is not None and len(events) == kill[0]:
                        time.sleep(kill[1])
                        for process in started:
                            with contextlib.suppress(ProcessLookupError):  # it was over already
                                os.kill(process, signal.SIGKILL)
                        killed.set()

        killed = threading.Event()
        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        codes = json.loads(self.server.stdout.readline())
        follower.join(60)  # what forked from a killed process may hold the pipe for a moment
        if any(codes) and not killed.is_set():
            self.log.seek(0)
            pytest.fail(self.log.read()[-6000:])
        return events, any(codes)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("runner"))
    yield runner
    runner.close()


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reproducible(record: dict[str, Any]) -> dict[str, Any]:
    """A report or log entry without what the clock says, and without TRL's count that begins anew in each process."""
    return {key: value for key, value in record.items() if not key.endswith("_seconds") and key != "num_tokens"}


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind that another run has to leave behind as well."""
    found: dict[str, Any] = {}
    for number in range(ITERATIONS):
        iteration = folder / "rollouts" / f"iteration_{number:03d}"
        found[f"{number} trajectories"] = sha(Journal(iteration / "journal").write_dataset(folder / "dataset.parquet"))
        for rows in ("rows", "training_rows"):  # with the reference's log-probabilities
            found[f"{number} {rows}"] = load_from_disk(iteration / rows).to_list()
    found["reports"] = [reproducible(vars(report)) for report in load_reports(folder / "rollouts")]
    state = json.loads((folder / "trainer_state.json").read_text())
    found["training"] = [reproducible(entry) for entry in state["log_history"] if "loss" in entry]
    found["steps"] = state["global_step"]
    found["trained"] = sha(folder / "rollouts" / f"iteration_{ITERATIONS:03d}" / "policy.safetensors")
    final, (checkpoint,) = folder / "final", folder.glob(f"checkpoint-{state['global_step']}")
    found["saved"] = {str(path.relative_to(final)): sha(path) for path in final.rglob("*.safetensors")}
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    found["optimizer"] = {
        name: {key: tensor.tolist() for key, tensor in moment.items()} for name, moment in moments.items()
    }
    return found


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        assert found[name] == expected[name], name


def disturb(
    runner: Runner, folder: Path, events: list, span: tuple[int, int], generator: random.Random, **arguments: Any
) -> bool:
    """Kills a run at one of the events `span` of its undisturbed twin, and then what goes on from there.

    Returns:
        Whether either of the two was still running then.
    """
    gaps = [after - before for (before, _), (after, _) in zip(events, events[1:], strict=False)] + [0.1]
    first, kills = generator.randrange(*span) + 1, 0
    for at in (first, generator.randrange(1, len(events) - first + 2)):
        delay = generator.uniform(0, gaps[at - 1])
        seen, was_killed = runner.run(folder, kill=(at, delay), **arguments)
        kills += was_killed
        if was_killed:
            print(f"{folder.name}: killed {delay:.3f} s after event {at}, {seen[at - 1][1]}; last: {seen[-1][1]}")
    return kills > 0


def check_kills(runner: Runner, folder: Path, runs: int, seed: int, **arguments: Any) -> None:
    """Kills `runs` runs twice each, at points spread over the whole of it, and compares their ends."""
    generator = random.Random(seed)
    events, _ = runner.run(folder / "undisturbed", **arguments)
    expected = outcome(folder / "undisturbed")
    assert len(expected["reports"]) == ITERATIONS and all(r["rows"] > 2 for r in expected["reports"])
    assert len({r["starting_revision"] for r in expected["reports"]}) == ITERATIONS
    for number in range(runs):
        span = number * len(events) // runs, (number + 1) * len(events) // runs
        folders = (folder / f"killed_{number}_{attempt}" for attempt in range(10))
        # One that was over each time before it was killed is no test: another is
        killed = next((each for each in folders if disturb(runner, each, events, span, generator, **arguments)), None)
        assert killed is not None, "the runs were over before they were killed"
        runner.run(killed, **arguments)
        compare(outcome(killed), expected)


RUNS = {
    "all weights, history of all": {"history": "all"},
    "adapter, dropout, rollouts beside training": {"lora": True, "save_total_limit": 2, "max_policy_lag": 1},
    "OREO: value model, two optimizers, a reference": {"method": "OREO"},
}
if KILLS > 2:  # else the launched run below stands for it
    RUNS["two processes"] = {"processes": 2}


@pytest.mark.parametrize("arguments", RUNS.values(), ids=RUNS)
def test_a_killed_run_ends_as_an_undisturbed_one(runner, tmp_path, arguments):
    check_kills(runner, tmp_path, runs=max(1, KILLS // 2), seed=KILLS, **arguments)


def test_a_launched_run_whose_process_is_killed_ends_as_an_undisturbed_one(runner, tmp_path):
    """By `accelerate launch` itself, which ends the other process."""
    runner.run(tmp_path / "undisturbed", processes=2)

    arguments = json.dumps({"folder": str(tmp_path / "killed")})
    # Process 1 dies at the second iteration's rollouts, when it is about to write the first one to its shard
    dies_at = "iteration_001/journal/shard-"
    killed = launch([*accelerate_launch(2), "-m", "tests.killed_run", arguments, dies_at])
    assert killed.returncode != 0 and "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr[-4000:]
    assert [report.iteration for report in load_reports(tmp_path / "killed" / "rollouts")] == [0]
    runner.run(tmp_path / "killed", processes=2)
    compare(outcome(tmp_path / "killed"), outcome(tmp_path / "undisturbed"))


def test_a_reward_repaired_between_kills_ends_as_if_it_had_never_been_broken(runner, tmp_path):
    """Killed while it rolls out, judges, selects, evaluates or trains its first iteration by the wrong reward."""
    generator = random.Random(KILLS)
    events, _ = runner.run(tmp_path / "undisturbed")
    expected = outcome(tmp_path / "undisturbed")
    begins = next(i for i, (_, path) in enumerate(events) if "iteration_000" in path)
    ends = next(i for i, (_, path) in enumerate(events) if "checkpoint-" in path)
    for number in range(max(1, KILLS // 2)):
        for attempt in range(10):
            folder = tmp_path / f"repaired_{number}_{attempt}"
            at = generator.randrange(begins, ends) + 1
            _, killed = runner.run(folder, kill=(at, generator.uniform(0, 0.01)), broken=True)
            if killed and not list(folder.glob("checkpoint-*")):  # nothing of the wrong rows has been kept
                break
        else:
            pytest.fail("no run was killed inside its first iteration")
        print(f"{folder.name}: killed at event {at}, {events[at - 1][1]}, with the wrong reward")
        disturb(runner, folder, events, (begins, len(events)), generator)
        runner.run(folder)
        compare(outcome(folder), expected)
