# /// script
# dependencies = ["trl-multiturn"]
# ///

"""
DQO on recorded trajectories: soft actor-critic whose Q-function is the policy (`--horizon response` is DRO).

`examples/prepare_real_data.py` writes the rows from recorded solutions. Any unpaired TRL dataset with a `label` or a
`reward` will do: the name of one on the Hub, or a JSONL or Parquet file.

# Full training
```bash
accelerate launch examples/dqo.py \
    --model_name_or_path Qwen/Qwen2.5-Math-1.5B \
    --dataset_name data/gsm8k_trajectory.jsonl \
    --value_model full --learning_rate 5e-7 --num_train_epochs 1 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
    --output_dir Qwen2.5-Math-1.5B-DQO
```

# LoRA, policy and value model on one backbone
```bash
accelerate launch examples/dqo.py \
    --model_name_or_path Qwen/Qwen2.5-Math-7B \
    --dataset_name data/gsm8k_trajectory.jsonl \
    --use_peft --lora_r 64 --lora_alpha 64 --value_model adapter --learning_rate 1e-6 --value_learning_rate 1e-4 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
    --output_dir Qwen2.5-Math-7B-DQO-LoRA
```

# CPU, without a download: a small policy is built and warm-started on the rows first
```bash
python examples/dqo.py \
    --dataset_name data/gsm8k_trajectory.jsonl \
    --value_model full --learning_rate 2e-5 --value_learning_rate 3e-4 \
    --num_train_epochs 1 --per_device_train_batch_size 16 --use_cpu --bf16 False --gradient_checkpointing False \
    --report_to none --save_strategy no --output_dir outputs/dqo
```

With `question_id` in the rows, problems are held out (`--held_out`), and the script prints how well the value of a
trajectory's last state tells correct from incorrect answers to them, and writes
`values.html`, the value after each step of some of them.
"""

import argparse
from dataclasses import dataclass, field

from trl import ScriptArguments


@dataclass
class DQOScriptArguments(ScriptArguments):
    """TRL's script arguments, and the share of problems held out."""

    held_out: float = field(
        default=0.15,
        metadata={"help": "Share of the problems on which values are compared with outcomes; 0 for none."},
    )
    balanced: bool = field(
        default=True,
        metadata={"help": "Train on as many correct as incorrect rows of each problem (with `question_id`)."},
    )


def main(script_args, training_args, model_args, dataset_args):
    from embedded.offline_values import (
        balance,
        hold_out,
        last_values,
        report_auc,
        small_policy,
        without_tools,
    )
    from trl import get_dataset, get_peft_config, get_quantization_config

    from trl_multiturn import DQOTrainer, preview_masks
    from trl_multiturn.data import choose_split, load_rows
    from trl_multiturn.data.value_preview import preview_values

    # Load the dataset
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    train_dataset, held_out = choose_split(dataset, script_args.dataset_train_split), None
    if script_args.held_out and "question_id" in train_dataset.column_names:
        train_dataset, held_out = hold_out(train_dataset, script_args.held_out)
        train_dataset = balance(train_dataset) if script_args.balanced else train_dataset

    # Without a model, build a small one
    if model_args.model_name_or_path is None:
        train_dataset, held_out = without_tools(train_dataset), without_tools(held_out)
        model_args.model_name_or_path = small_policy(train_dataset, f"{training_args.output_dir}/initial_policy")
    training_args.model_init_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    )

    # Initialize the trainer
    trainer = DQOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # Look at what is trained before training
    if trainer.accelerator.is_main_process:
        preview_masks(trainer)

    # Train the model
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if held_out is not None and trainer.accelerator.is_main_process:
        report_auc(last_values(trainer, trainer.eval_dataset))
    trainer.accelerator.print("✅ Training completed.")

    # Look at values along held-out trajectories: where the reasoning breaks, they should drop
    if held_out is not None and trainer.accelerator.is_main_process:
        pages = preview_values(trainer, num_rows=20, show=False)
        pages.save(f"{training_args.output_dir}/values.html")

    # Save and push to Hub
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Policy saved to {training_args.output_dir}, the value model in its `value_model`.")

    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_multiturn import DQOConfig

    dataclass_types = (DQOScriptArguments, DQOConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("dqo", help="Run the DQO script", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    script_args, training_args, model_args, dataset_args = make_parser().parse_args_and_config()
    main(script_args, training_args, model_args, dataset_args)
