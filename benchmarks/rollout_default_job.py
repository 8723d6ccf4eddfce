"""
Rollouts of the embedded default job (`examples/iterative_multi_turn_dpo.py`): this checkout's, and another's.

    python benchmarks/rollout_default_job.py --policy outputs/iterative_multi_turn_dpo/warm_start
    python benchmarks/rollout_default_job.py --policy … --against ../earlier_checkout --repeats 3

12 trajectories for each of `--prompts` word problems, with the sandbox and the verifier, by the policy that the
example leaves in `warm_start`, as many at once as the example's configuration says. The arms are processes of their
own and alternate. The report says whether they gave the same trajectories to the last bit, log-probabilities and
rewards included. CPU seconds are those of the trainer's process and of all that it started (interpreters, verifiers);
the wall clock's depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def roll_out(policy: str, prompts: int) -> dict[str, Any]:
    """One arm, in a process of its own."""
    import torch
    import yaml
    from embedded.default_job import CONFIGS
    from embedded.word_problems import make_problems
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import trl_multiturn
    from trl_multiturn import PythonTool, RolloutConfig, TransformersEngine, generate_trajectories, math_reward

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    job = yaml.safe_load((CONFIGS / "dpo_cpu.yaml").read_text())  # of the arm's own checkout
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    engine = TransformersEngine(model, tokenizer, max_batch_size=job["rollout_batch_size"])
    config = RolloutConfig(
        num_generations=12,
        max_turn_tokens=80,
        max_trajectory_tokens=256,
        system_prompt="",
        dialect="fenced",
        seed=42,
        max_concurrent_trajectories=job.get("max_concurrent_trajectories", 256),
    )
    rows = make_problems(prompts, 1042)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    with PythonTool() as tool, tempfile.TemporaryDirectory() as journal:
        done = generate_trajectories(
            rows, engine, [tool], config, reward_funcs=[math_reward], journal=journal, progress=False
        )
        seconds = time.perf_counter() - started
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.dumps([(each.completion_ids, each.logps, each.reward) for each in done])
    return {
        "package": str(Path(trl_multiturn.__file__).parents[1]),
        "trajectories": len(done),
        "result": hashlib.sha256(result.encode()).hexdigest(),
        "reward": statistics.mean(each.reward or 0.0 for each in done),
        "tokens": sum(len(each.completion_ids) for each in done),
        "wall": seconds,
        "own": own.ru_utime + own.ru_stime - before.ru_utime - before.ru_stime,
        "others": others.ru_utime + others.ru_stime,
        "steps": engine.stats["steps"],
    }


def run_arm(checkout: Path, policy: str, prompts: int) -> dict[str, Any]:
    path = os.pathsep.join([str(checkout), str(checkout / "examples")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--arm", "--policy", policy, "--prompts", str(prompts)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    if output.returncode:
        raise SystemExit(output.stderr)
    result = json.loads(output.stdout.splitlines()[-1])
    if result["package"] != str(checkout):
        raise SystemExit(f"{result['package']} was imported in place of {checkout}.")
    return result


def report(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    first = next(iter(arms.values()))
    same = len({run["result"] for runs in arms.values() for run in runs}) == 1
    lines = [
        f"The trajectories are {'the same to the last bit' if same else 'not the same'}.",
        "",
        "| checkout | tokens | mean reward | steps | wall s | trajectories/s (x) "
        "| CPU s: trainer | what it started | all |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in arms.items():
        pairs = list(zip(runs, first, strict=True))
        faster = statistics.median(other["wall"] / run["wall"] for run, other in pairs)
        less = [_cpu(run) / _cpu(other) for run, other in pairs]
        keys = ("tokens", "reward", "steps", "wall", "own", "others")
        tokens, reward, steps, wall, own, others = (statistics.median(run[key] for run in runs) for key in keys)
        lines.append(
            f"| {name} | {tokens:.0f} | {reward:.3f} | {steps:.0f} | {wall:.1f} "
            f"| {runs[0]['trajectories'] / wall:.0f} (**{faster:.2f} x**) | {own:.1f} | {others:.1f} "
            f"| **{statistics.median(less):.2f} x** ({min(less):.2f}..{max(less):.2f}) |"
        )
    return lines


def _cpu(run: dict[str, Any]) -> float:
    return run["own"] + run["others"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="the folder `warm_start` of the example's output")
    parser.add_argument("--prompts", type=int, default=250)
    parser.add_argument("--against", type=Path, help="another checkout of this package, the first arm")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    policy = str(Path(arguments.policy).resolve())
    if arguments.arm:
        print(json.dumps(roll_out(policy, arguments.prompts)))
        return
    checkouts = {"this one": Path(__file__).resolve().parents[1]}
    if arguments.against:
        checkouts = {"the other": arguments.against.resolve(), **checkouts}
    load = os.getloadavg()[0]
    arms: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for _ in range(arguments.repeats):
        for name, checkout in checkouts.items():
            arms[name].append(run_arm(checkout, policy, arguments.prompts))
    trajectories = next(iter(arms.values()))[0]["trajectories"]
    print(
        f"{datetime.date.today()}, {os.cpu_count()} cores, load average {load:.1f} before, {os.getloadavg()[0]:.1f} "
        f"after; {trajectories} trajectories, {arguments.repeats} runs of each."
    )
    print("\n".join(report(arms)))


if __name__ == "__main__":
    main()
