# /// script
# dependencies = ["trl-multiturn"]
# ///

"""
M-KTO on recorded trajectories: TRL's `kto.py` with the class changed.

# Full training
```bash
accelerate launch examples/multi_turn_kto.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name data/gsm8k_trajectory.jsonl \
    --learning_rate 4e-7 --num_train_epochs 1 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
    --max_length 2048 --output_dir Qwen2.5-1.5B-M-KTO
```

# LoRA
```bash
accelerate launch examples/multi_turn_kto.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \
    --dataset_name data/gsm8k_trajectory.jsonl \
    --learning_rate 5e-6 --num_train_epochs 1 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \
    --max_length 2048 --use_peft --lora_r 32 --lora_alpha 16 --output_dir Qwen2.5-1.5B-M-KTO-LoRA
```

# CPU, the policy of `iterative_multi_turn_dpo.py`
```bash
python examples/multi_turn_kto.py \
    --model_name_or_path outputs/iterative_multi_turn_dpo \
    --dataset_name data/tora_trajectory.jsonl \
    --max_steps 20 --per_device_train_batch_size 4 --use_cpu --bf16 False \
    --max_length 1024 --report_to none --output_dir outputs/multi_turn_kto
```

`examples/prepare_real_data.py` writes the data files from recorded solutions. Any TRL unpaired preference dataset will
do, and a paired one too: its sides are trained on in turns.
"""

import argparse


def main(script_args, training_args, model_args, dataset_args):
    from trl import get_dataset, get_peft_config, get_quantization_config

    from trl_multiturn import MultiTurnKTOTrainer, preview_masks
    from trl_multiturn.data import choose_split, load_rows

    training_args.model_init_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    )

    # Load the dataset
    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)

    # Initialize the trainer
    trainer = MultiTurnKTOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=choose_split(dataset, script_args.dataset_train_split),
        eval_dataset=(
            choose_split(dataset, script_args.dataset_test_split) if training_args.eval_strategy != "no" else None
        ),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # Look at what is trained before training
    if trainer.accelerator.is_main_process:
        preview_masks(trainer)

    # Train the model
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    # Save and push to Hub
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")

    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    trainer.end()


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

    from trl_multiturn import MultiTurnKTOConfig

    dataclass_types = (ScriptArguments, MultiTurnKTOConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("multi-turn-kto", help="Run the M-KTO script", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    script_args, training_args, model_args, dataset_args = make_parser().parse_args_and_config()
    main(script_args, training_args, model_args, dataset_args)
