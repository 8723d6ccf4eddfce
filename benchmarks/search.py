"""
Does a learned value pay? Search beside greedy decoding, votes and samples, at equal numbers of sampled tokens.

    for s in 0 1 2; do python examples/iterative_multi_turn_dpo.py --seed $s --output_dir outputs/seed$s; done
    python benchmarks/search.py outputs/seed0 outputs/seed1 outputs/seed2 --output outputs/search

For each policy: rollouts of its own on training problems, a value model by classification on them, and
`evaluate_policy(search=…)` on held-out problems. `any of n` is what an oracle that knows the right answer reaches.
Beside the value model's processor time stands that of one pass of OREO over the same rows (`--oreo`). A policy whose
numbers are in the output folder is not run again.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
NAMES = ("search", "greedy", "one_sample", "vote", "weighted_vote", "best_of_n", "any_of_n")
COMMON = {"per_device_train_batch_size": 32, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
COMMON |= {"report_to": "none", "save_strategy": "no", "logging_steps": 50, "disable_tqdm": True}
COMMON |= {"dataloader_pin_memory": False}


def measure(policy: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Rolls out, trains a value model, searches."""
    from embedded.word_problems import make_problems
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_multiturn import (
        PythonTool,
        RolloutConfig,
        TransformersEngine,
        ValueModel,
        ValueModelConfig,
        evaluate_policy,
        generate_trajectories,
        math_reward,
        train_value_model,
        value_guided_search,
    )

    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    engine = TransformersEngine(model.eval(), tokenizer)
    config = RolloutConfig(
        dialect="fenced", system_prompt="", num_generations=12, max_turn_tokens=80, max_trajectory_tokens=256, seed=7
    )
    with PythonTool() as tool:
        trajectories = generate_trajectories(
            make_problems(options.prompts, 2000), engine, [tool], config, reward_funcs=math_reward,
            journal=folder / "rollouts", progress=False,
        )  # fmt: skip
        args = ValueModelConfig(
            str(folder / "values"), value_model="full", learning_rate=2e-3, num_train_epochs=options.passes,
            lr_scheduler_type="cosine", warmup_steps=20, **COMMON,
        )  # fmt: skip
        trained, seconds = folder / "values" / "value_model", folder / "seconds.json"
        if not trained.exists():
            started = time.process_time()
            train_value_model(policy, trajectories, args)
            seconds.write_text(json.dumps({"value_s": time.process_time() - started}), encoding="utf-8")
        value_model = ValueModel.from_pretrained(trained)
        if options.oreo:
            spent = json.loads(seconds.read_text(encoding="utf-8"))
            if "oreo_s" not in spent:
                spent["oreo_s"] = one_pass_of_oreo(policy, trajectories, folder)
                seconds.write_text(json.dumps(spent), encoding="utf-8")
        search = functools.partial(
            value_guided_search, score=value_model.score, beam=3, finished="pool", vote="weighted"
        )
        held_out = make_problems(options.held_out, 0, "test")
        found = evaluate_policy(
            held_out, engine, [tool], math_reward, n=4, temperature=options.temperature, config=config,
            search=search, progress=False,
        )  # fmt: skip
    print(f"{policy}\n{found.comparison}", flush=True)
    values = json.loads((folder / "values" / "eval_results.json").read_text(encoding="utf-8"))
    correct = sum(t.reward == 1 for t in trajectories) / len(trajectories)
    spent = json.loads(seconds.read_text(encoding="utf-8"))
    return {"policy": policy, "correct": correct, **values, **spent, **found.comparison.metrics()}


def one_pass_of_oreo(policy: str, trajectories: list[Any], folder: Path) -> float:
    """Processor seconds of one pass of OREO with a value model of its own over the same trajectories."""
    from transformers import AutoTokenizer

    from trl_multiturn import OREOConfig, OREOTrainer, UnpairedConfig, build_unpaired_dataset

    args = OREOConfig(str(folder / "oreo"), value_model="full", num_train_epochs=1, **COMMON)
    rows = build_unpaired_dataset(trajectories, UnpairedConfig(strategy="all"))
    tokenizer = AutoTokenizer.from_pretrained(policy)
    started = time.process_time()
    OREOTrainer(model=policy, args=args, train_dataset=rows, processing_class=tokenizer).train()
    return time.process_time() - started


def report(results: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """A row per policy, and the mean of the differences with the standard error of the mean over prompts."""
    header = ["policy", "rollouts correct", "AUC within a prompt", "value: CPU s", "OREO, one pass: CPU s"]
    header += ["tokens: search", "samples"]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for each in results:
        cells = [Path(each["policy"]).name, f"{100 * each['correct']:.1f} %", f"{each['eval_auc_within_prompt']:.3f}"]
        cells += [f"{each['value_s']:.0f}", f"{each['oreo_s']:.0f}" if "oreo_s" in each else "–"]
        cells += [f"{each['search/tokens']:.0f}", f"{each['search/sample_tokens']:.0f} ({each['search/n']:.0f})"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| policy | " + " | ".join(name.replace("_", " ") for name in NAMES) + " |"]
    lines.append("|" + " --- |" * (len(NAMES) + 1))
    for each in results:
        cells = [f"{100 * each[f'search/{n}']:.1f} ± {100 * each[f'search/{n}_se']:.1f}" for n in NAMES]
        lines.append("| " + " | ".join([Path(each["policy"]).name, *cells]) + " |")
    means = [f"{100 * sum(each[f'search/{n}'] for each in results) / len(results):.1f}" for n in NAMES]
    lines.append("| " + " | ".join(["mean", *means]) + " |")
    differences = []
    for name in NAMES[1:]:
        mean = sum(each[f"search/minus_{name}"] for each in results) / len(results)
        error = math.sqrt(sum(each[f"search/minus_{name}_se"] ** 2 for each in results)) / len(results)
        differences.append(f"{100 * mean:+.1f} ± {100 * error:.1f}")
    lines.append("| " + " | ".join(["search minus it", "", *differences]) + " |")
    conditions = (
        f"{options.held_out} held-out problems, temperature {options.temperature}, {options.prompts} x 12 rollouts, "
        f"{options.passes} passes, one thread, torch {torch.__version__}, {datetime.date.today()}."
    )
    return "\n".join([conditions, "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="+", help="folders of saved policies")
    parser.add_argument("--output", type=Path, default=Path("outputs/search"))
    parser.add_argument("--prompts", type=int, default=500, help="training problems, of 12 rollouts each")
    parser.add_argument("--passes", type=float, default=2.0, help="of the value model over the rollouts")
    parser.add_argument("--held_out", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7, help="of the search and the samples")
    parser.add_argument("--oreo", action="store_true", help="time one pass of OREO, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for policy in options.policies:
        folder = options.output / Path(policy).name
        done = folder / "result.json"
        if not done.exists():
            result = measure(policy, folder, options)
            done.write_text(json.dumps(result, indent=1), encoding="utf-8")
        results.append(json.loads(done.read_text(encoding="utf-8")))
    print(report(results, options))


if __name__ == "__main__":
    main()
