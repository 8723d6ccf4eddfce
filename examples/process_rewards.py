# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
Process rewards: complete the prefixes of trajectories, train a process and an outcome reward model on what comes out,
and let them choose among samples (the least reward of a trajectory's steps, the reward at its end) and guide a search.

# The embedded default: a CPU, no download
```bash
python examples/process_rewards.py
```

What came out is in `benchmarks/results/values.md`: the machinery works, with so few rows it gains nothing.

# Full training (M-DPO paper 2409.02392, examples 2 and 3)
```bash
accelerate launch examples/process_rewards.py \
    --policy Qwen/Qwen2.5-Math-1.5B-Instruct \
    --dataset_name openai/gsm8k --dataset_config main \
    --num_prompts 2000 --num_completions 8 --learning_rate 1e-5 --per_device_train_batch_size 4 \
    --max_turn_tokens 512 --max_trajectory_tokens 2048 --use_cpu False --bf16 True \
    --output_dir Qwen2.5-Math-1.5B-PRM
```
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trl_multiturn.scripts.arguments import PromptArguments
from trl_multiturn.scripts.prompts import load_prompts


# What the embedded default uses in place of Transformers' own defaults
EMBEDDED = {
    "output_dir": "outputs/process_rewards",
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "lr_scheduler_type": "cosine",
    "logging_steps": 20,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


@dataclass
class ProcessRewardArguments(PromptArguments):
    """What to roll out, complete and compare."""

    policy: str | None = field(default=None, metadata={"help": "Folder or name; a small policy is built without."})
    num_prompts: int = field(default=150, metadata={"help": "Prompts whose trajectories are completed."})
    num_generations: int = field(default=4, metadata={"help": "Trajectories of each."})
    num_completions: int = field(default=8, metadata={"help": "Completions of each prefix (N in eq. 2)."})
    delimiter: str = field(default="line", metadata={"help": "What a step is: `turn`, `line` or `sentence`."})
    num_eval_prompts: int = field(default=100, metadata={"help": "Held-out prompts."})
    best_of: int = field(default=4, metadata={"help": "Samples to choose from; width of the search."})
    max_turn_tokens: int = field(default=80, metadata={"help": "Most tokens of one turn."})
    max_trajectory_tokens: int = field(default=256, metadata={"help": "Most tokens of prompt and completion."})


def main(script_args, training_args):
    from trl_multiturn import (
        PythonTool,
        RolloutConfig,
        TransformersEngine,
        evaluate_policy,
        generate_trajectories,
        math_reward,
    )
    from trl_multiturn.evaluation import summarize
    from trl_multiturn.models.reward_model import outcome_reward_rows, process_reward_rows
    from trl_multiturn.rollout.prefix_completion import estimate_step_rewards
    from trl_multiturn.rollout.search import value_guided_search
    from trl_multiturn.scripts.sampling import load_policy

    policy, prompts, eval_prompts = prepare(script_args, training_args)
    engine, tools = TransformersEngine(*load_policy(policy)), [PythonTool()]
    config = RolloutConfig(
        dialect="fenced",
        num_generations=script_args.num_generations,
        max_turn_tokens=script_args.max_turn_tokens,
        max_trajectory_tokens=script_args.max_trajectory_tokens,
        seed=training_args.seed,
    )

    # Roll out, then complete every prefix; the interpreter is brought to each prefix's state first
    trajectories = generate_trajectories(prompts, engine, tools, config, reward_funcs=math_reward)
    delimiter = script_args.delimiter
    labelled = estimate_step_rewards(
        trajectories, prompts, engine, tools, config,
        delimiter=delimiter, num_completions=script_args.num_completions, reward_funcs=math_reward,
    )  # fmt: skip

    # Train both reward models from the policy's weights
    process = train(policy, process_reward_rows(labelled), training_args, "process")
    outcome = train(policy, outcome_reward_rows(trajectories), training_args, "outcome")

    # Compare on held-out prompts: greedy, a random sample, the best of n by either model, the search
    n = script_args.best_of
    search = partial(value_guided_search, score=process.score, beam=2, candidates=n, step=delimiter, score_at="action")
    greedy = evaluate_policy(eval_prompts, engine, tools, math_reward, n=n, temperature=1.0, config=config)
    samples = [t for t in greedy.trajectories if t.info["policy"] == "evaluation-samples"]
    groups = [[t for t in samples if t.info["prompt_index"] == i] for i in range(len(eval_prompts))]
    tokenizer = engine.processing_class
    by_step = [max(group, key=lambda t: process.process_utility(t, delimiter, tokenizer)) for group in groups]
    ends = [outcome.outcome_utilities(group) for group in groups]
    by_end = [group[utilities.index(max(utilities))] for group, utilities in zip(groups, ends, strict=True)]
    found = evaluate_policy(eval_prompts, engine, tools, math_reward, config=config, search=search)
    for name, estimate in {
        "greedy": greedy.greedy,
        "one sample": greedy.pass_at_k[1],
        f"best of {n} by outcome reward": summarize(by_end).greedy,
        f"best of {n} by the least process reward": summarize(by_step).greedy,
        f"search by process reward, beam 2, {n} candidates": found.greedy,
        f"any of {n}, the most that choosing can reach": greedy.pass_at_k[n],
    }.items():
        print(f"{name:<48} {estimate}")
    tools[0].close()


def prepare(script_args, training_args):
    """The policy's folder or name, prompts, and held-out prompts."""
    from embedded.default_job import imitating_policy
    from embedded.word_problems import make_problems

    policy = script_args.policy or imitating_policy(training_args)
    if script_args.dataset_name is None:
        prompts = make_problems(script_args.num_prompts, seed=1000 + training_args.seed)
        return policy, prompts, make_problems(script_args.num_eval_prompts, seed=0, split="test")
    prompts, eval_prompts = load_prompts(script_args)
    return policy, prompts.select(range(min(script_args.num_prompts, len(prompts)))), eval_prompts


def train(policy, rows, training_args, name):
    """A reward model that starts as the policy, trained with Transformers' own trainer."""
    from transformers import AutoTokenizer, Trainer

    from trl_multiturn.models.reward_model import (
        DataCollatorForRewardModel,
        RewardModel,
        reward_model_from_policy,
        step_reward_loss,
    )

    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = reward_model_from_policy(policy)
    collator = DataCollatorForRewardModel(tokenizer.pad_token_id)
    trainer = Trainer(
        model, training_args, collator, train_dataset=rows, processing_class=tokenizer,
        compute_loss_func=step_reward_loss,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(Path(training_args.output_dir, f"{name}_reward_model")))
    return RewardModel(trainer.model, batch_size=32)


if __name__ == "__main__":
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser([ProcessRewardArguments, TrainingArguments])
    parser.set_defaults(**EMBEDDED)
    main(*parser.parse_args_into_dataclasses(sys.argv[1:]))
