"""What all arms of a world and seed share: a policy that imitates the teacher, and its rollouts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from .settings import EXAMPLES, Setting


def starting_policy(setting: Setting, seed: int, folder: Path) -> Path:
    """The folder of the policy that every arm starts from; made once, and whole where it exists."""
    done = folder / "start"
    if not done.exists():
        if str(EXAMPLES) not in sys.path:
            sys.path.insert(0, str(EXAMPLES))
        from embedded.tiny_policy import build_policy, build_tokenizer, warm_start

        partial = folder / "start.partial"
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer = build_tokenizer(setting.texts())
        policy = build_policy(tokenizer, seed=seed, hidden_size=setting.sizes.hidden_size)
        rows = setting.demonstrations(seed)
        warm_start(policy, tokenizer, rows, str(partial), seed=seed, warmup_steps=0.05, disable_tqdm=True)
        tokenizer.save_pretrained(partial)
        policy.save_pretrained(partial)
        partial.rename(done)
    return done


def load(folder: Path) -> tuple[Any, Any]:
    """A policy and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def rollouts(setting: Setting, seed: int, folder: Path) -> list[Any]:
    """Trajectories of the starting policy on the training prompts; those that are in the journal are not repeated."""
    from trl_multiturn import Journal, TransformersEngine, generate_trajectories

    policy, tokenizer = load(starting_policy(setting, seed, folder))
    prompts = training_prompts(setting, seed, 1)
    with Journal(folder / "journal") as journal:
        return generate_trajectories(
            prompts,
            TransformersEngine(policy, tokenizer),
            config=setting.rollout_config(seed),
            journal=journal,
            progress=False,
            **setting.tools(),
        )


def with_process_rewards(setting: Setting, seed: int, folder: Path, trajectories: list[Any], count: int) -> list[Any]:
    """The same trajectories with DQO's process rewards; the starting policy completes each prefix `count` times."""
    from trl_multiturn import TransformersEngine
    from trl_multiturn.rollout.prefix_completion import reward_longest_good_prefix

    engine = TransformersEngine(*load(starting_policy(setting, seed, folder)))
    config, prompts = setting.rollout_config(seed), training_prompts(setting, seed, 1)
    return reward_longest_good_prefix(
        trajectories, prompts, engine, config=config, num_completions=count, progress=False, **setting.tools()
    )


def training_prompts(setting: Setting, seed: int, iterations: int) -> Any:
    """Prompts for so many iterations; those of the first are the offline arms' own."""
    count = setting.sizes.prompts
    return setting.problems(count * iterations, 1000 + seed, "train")
