# /// script
# dependencies = ["trl-multiturn"]
# ///

r"""
Online iterative M-DPO: roll out with a Python interpreter, verify, filter, pair, train, refresh the reference; repeat.

# The embedded default: a CPU, no download, a few minutes
```bash
python examples/iterative_multi_turn_dpo.py
```

# Full training (M-DPO paper 2409.02392, section 3.1)
```bash
accelerate launch examples/iterative_multi_turn_dpo.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name openai/gsm8k --dataset_config main \
    --num_generations 30 --previous_policy_generations 10 \
    --num_train_epochs 3 --prompts_per_iteration 2400 \
    --learning_rate 4e-7 --beta 0.1 --per_device_train_batch_size 2 --gradient_accumulation_steps 16 \
    --max_length 2048 --output_dir Qwen2.5-1.5B-M-DPO
```

# LoRA
```bash
accelerate launch examples/iterative_multi_turn_dpo.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name openai/gsm8k --dataset_config main \
    --num_generations 30 --previous_policy_generations 10 \
    --num_train_epochs 3 --prompts_per_iteration 2400 \
    --learning_rate 5e-6 --beta 0.1 --per_device_train_batch_size 2 --gradient_accumulation_steps 16 \
    --max_length 2048 --use_peft --lora_r 32 --lora_alpha 16 --output_dir Qwen2.5-1.5B-M-DPO-LoRA
```

A run that was stopped goes on where it was when the same command is given again.
"""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments


SYSTEM_PROMPT = (
    "Solve the problem with Python. Write one ```python block at a time; its output comes back in an ```output block. "
    "When you know the answer, put it in \\boxed{}."
)

# What the embedded default uses in place of the defaults of TRL and of the paper.
EMBEDDED = {
    "output_dir": "outputs/iterative_multi_turn_dpo",
    "num_train_epochs": 3,
    "learning_rate": 3e-4,
    "beta": 0.5,  # a small policy degenerates at the paper's 0.1, which suits 7B
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "per_device_train_batch_size": 8,
    "max_length": 256,
    "logging_steps": 5,
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "num_generations": 12,
    "previous_policy_generations": 4,
    "rollout_batch_size": 256,
    "prompts_per_iteration": 250,
    "max_pairs_per_prompt": 4,
    "max_turn_tokens": 80,
    "max_trajectory_tokens": 256,
    "system_prompt": None,
}


@dataclass
class IterativeScriptArguments(ScriptArguments):
    """TRL's script arguments and those of the loop. `num_train_epochs` is the number of iterations."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset of questions and answers; without it the embedded problems are used."}
    )
    question_column: str = field(default="question", metadata={"help": "Column with the question."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the gold answer."})
    system_prompt: str | None = field(default=SYSTEM_PROMPT, metadata={"help": "System message of every prompt."})
    prompts_per_iteration: int | None = field(
        default=None, metadata={"help": "Prompts of one iteration, in order; all of them by default."}
    )
    num_eval_prompts: int = field(default=200, metadata={"help": "Held-out prompts for pass@1 (0: no evaluation)."})
    num_generations: int = field(default=30, metadata={"help": "Rollouts per prompt."})
    previous_policy_generations: int | None = field(
        default=None,
        metadata={"help": "How many of them the previous iteration's policy samples; a third by default."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the rollouts."})
    rollout_batch_size: int = field(default=64, metadata={"help": "Trajectories that sample a token together."})
    max_tool_calling_iterations: int = field(default=6, metadata={"help": "Most rounds of tool calls."})
    max_turn_tokens: int = field(default=512, metadata={"help": "Most tokens of one turn."})
    max_trajectory_tokens: int = field(default=2048, metadata={"help": "Most tokens of prompt and completion."})
    pairing_strategy: str = field(default="random", metadata={"help": "`random`, `best_worst` or `step`."})
    max_pairs_per_prompt: int = field(default=1, metadata={"help": "Most pairs per prompt."})
    reference: str = field(default="previous", metadata={"help": "Reference policy: `previous` or `initial`."})
    history: str = field(default="latest", metadata={"help": "Rows of the `latest` iteration, or of `all`."})
    sft_problems: int = field(
        default=12000,
        metadata={"help": "Embedded default only: problems that the warm start learns from, in one pass."},
    )


def main(script_args, training_args, model_args):
    import torch
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from trl_multiturn import (
        MultiTurnDPOTrainer,
        PairingConfig,
        PythonTool,
        RolloutConfig,
        ToolRolloutGenerator,
        TransformersEngine,
        evaluate_policy,
        math_reward,
        preview_masks,
    )

    if model_args.model_name_or_path is None:
        torch.set_num_threads(1)  # so small a model gains nothing from more, and they would wait on the interpreter
        model_args.model_name_or_path = warm_started_policy(script_args, training_args)
    training_args.model_init_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    )
    prompts, eval_prompts = load_prompts(script_args, training_args)

    # The loop: a callback in place of a training set
    tool = PythonTool()
    rollout_config = RolloutConfig(
        num_generations=script_args.num_generations,
        previous_policy_generations=script_args.previous_policy_generations,
        temperature=script_args.temperature,
        max_tool_calling_iterations=script_args.max_tool_calling_iterations,
        max_turn_tokens=script_args.max_turn_tokens,
        max_trajectory_tokens=script_args.max_trajectory_tokens,
        dialect="fenced",
        system_prompt=script_args.system_prompt,
        seed=training_args.seed,
    )
    generator = ToolRolloutGenerator(
        prompts,
        tools=[tool],
        reward_funcs=[math_reward],
        config=rollout_config,
        pairing=PairingConfig(
            strategy=script_args.pairing_strategy,
            max_pairs_per_prompt=script_args.max_pairs_per_prompt,
            seed=training_args.seed,
        ),
        reference=script_args.reference,
        history=script_args.history,
        prompts_per_iteration=script_args.prompts_per_iteration,
        eval_prompts=eval_prompts,
        engine=lambda model, tokenizer: TransformersEngine(model, tokenizer, script_args.rollout_batch_size),
    )
    trainer = MultiTurnDPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        processing_class=AutoTokenizer.from_pretrained(model_args.model_name_or_path),
        callbacks=[generator],
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # Train; after a stop the last checkpoint and the finished rollouts are taken up again
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or True)

    # What was trained on: green tokens are the policy's own, the rest is context
    if trainer.accelerator.is_main_process:
        preview_masks(trainer)

    # Save the best policy
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 The best policy is in {training_args.output_dir}.")

    # Load it as any user would, and check that it is the one that was measured
    if eval_prompts is not None and trainer.accelerator.is_main_process:
        engine = load_engine(training_args.output_dir, trainer.accelerator.device)
        result = evaluate_policy(eval_prompts, engine, [tool], [math_reward], config=rollout_config)
        print(f"Reloaded: pass@1 {result.greedy} on {result.greedy.num_prompts} held-out prompts.")

    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


def load_engine(folder, device=None):
    """The saved policy, plain or adapter, behind the engine that the rollouts used."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_multiturn import TransformersEngine

    adapter = Path(folder, "adapter_config.json").exists()
    model_class = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = model_class.from_pretrained(folder)
    return TransformersEngine(model if device is None else model.to(device), AutoTokenizer.from_pretrained(folder))


def load_prompts(script_args, training_args):
    """Prompts and held-out prompts, with the columns `prompt` (messages) and `answer`."""
    from datasets import load_dataset

    if script_args.dataset_name is None:
        from word_problems import make_problems

        iterations = int(training_args.num_train_epochs)
        train = make_problems((script_args.prompts_per_iteration or 250) * iterations, 1000 + training_args.seed)
        test = make_problems(max(script_args.num_eval_prompts, 1), seed=0, split="test")
    else:
        dataset = load_dataset(script_args.dataset_name, script_args.dataset_config)

        def to_prompt(row):
            question = {"role": "user", "content": row[script_args.question_column]}
            return {"prompt": [question], "answer": row[script_args.answer_column]}

        train, test = (
            dataset[split].map(to_prompt, remove_columns=dataset[split].column_names)
            for split in (script_args.dataset_train_split, script_args.dataset_test_split)
        )
    if not script_args.num_eval_prompts:
        return train, None
    return train, test.select(range(min(script_args.num_eval_prompts, len(test))))


def warm_started_policy(script_args, training_args):
    """Builds the embedded tokenizer and policy and imitates the imperfect teacher; the folder of the result.

    A folder that holds the result already is used as it is: a run that was stopped starts from the same policy.
    """
    from tiny_policy import build_policy, build_tokenizer, warm_start
    from word_problems import make_problems, teacher_trajectories, texts

    folder = Path(training_args.output_dir, "warm_start")
    if not Path(folder, "config.json").exists():
        tokenizer = build_tokenizer(texts())
        problems = make_problems(script_args.sft_problems, seed=training_args.seed)
        rows = teacher_trajectories(problems, seed=training_args.seed)
        policy = build_policy(tokenizer, seed=training_args.seed)
        partial = folder.with_name("warm_start.partial")
        warm_start(policy, tokenizer, rows, str(partial), seed=training_args.seed)
        if training_args.process_index == 0:  # renamed at the end, so that the folder is whole or not there
            tokenizer.save_pretrained(partial)
            policy.save_pretrained(partial)
            partial.rename(folder)
        training_args.distributed_state.wait_for_everyone()
    return str(folder)


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import ModelConfig, TrlParser

    from trl_multiturn import MultiTurnDPOConfig

    dataclass_types = (IterativeScriptArguments, MultiTurnDPOConfig, ModelConfig)
    if subparsers is not None:
        return subparsers.add_parser("iterative-dpo", help="Run online M-DPO", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    parser = make_parser()
    if not any(argument.startswith(("--model_name_or_path", "--config")) for argument in sys.argv[1:]):
        parser.set_defaults(**EMBEDDED)
    script_args, training_args, model_args = parser.parse_args_and_config()
    main(script_args, training_args, model_args)
