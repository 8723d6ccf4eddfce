# /// script
# dependencies = ["trl-multiturn"]
# ///

"""
SFT on trajectories with the observations masked: the baseline, and the warm start of everything else.

The loss counts the policy's own turns, whatever the chat template: TRL's `SFTTrainer` gets rows with labels.

# Full training
```bash
accelerate launch examples/sft.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B \
    --dataset_name data/tora_trajectory.jsonl --only_correct \
    --learning_rate 1e-5 --num_train_epochs 3 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
    --max_length 2048 --output_dir Qwen2.5-1.5B-SFT
```

# LoRA
```bash
accelerate launch examples/sft.py \
    --model_name_or_path Qwen/Qwen2.5-1.5B \
    --dataset_name data/tora_trajectory.jsonl --only_correct \
    --learning_rate 1e-4 --num_train_epochs 3 \
    --per_device_train_batch_size 8 --gradient_accumulation_steps 8 \
    --max_length 2048 --use_peft --lora_r 32 --lora_alpha 16 --output_dir Qwen2.5-1.5B-SFT-LoRA
```

# CPU, the policy of `iterative_multi_turn_dpo.py`
```bash
python examples/sft.py \
    --model_name_or_path outputs/iterative_multi_turn_dpo \
    --dataset_name data/tora_trajectory.jsonl --only_correct \
    --max_steps 20 --per_device_train_batch_size 4 --use_cpu --bf16 False \
    --max_length 1024 --report_to none --output_dir outputs/sft
```

# Without a model: one is built for the rows, tokenizer included, and reads all of them, as in pretraining
```bash
python examples/sft.py \
    --dataset_name data/gsm8k_train_trajectory.jsonl --only_correct --whole_text --without_tools --held_out 0.03 \
    --hidden_size 512 --num_layers 8 --vocabulary 4000 \
    --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 100 --weight_decay 0.1 --num_train_epochs 3 \
    --per_device_train_batch_size 64 --train_sampling_strategy group_by_length --max_length 768 \
    --eval_strategy epoch --save_strategy epoch --load_best_model_at_end \
    --report_to none --output_dir outputs/language_model
```

On the rows of `prepare_real_data.py --variants 6` (about 24,000 gold solutions of GSM8K's training problems, told with
other numbers, too) this takes two minutes of one H200 (2026-11-20, with `--adam_beta2 0.95`); the loss on held-out
problems is 2.37, 2.27 and 2.28 nats per token after the three epochs. Such a model writes like its rows and calculates
like nobody: of 18,000 answers that it sampled to training problems (`roll_out_calculator.py`), 1.7 % were right.
"""

import argparse
from dataclasses import dataclass, field

from trl import ScriptArguments


@dataclass
class SupervisedScriptArguments(ScriptArguments):
    """TRL's script arguments, what is imitated, and the size of a policy that is built on the spot."""

    only_correct: bool = field(
        default=False, metadata={"help": "Keep the rows whose `label` is true, or whose `reward` is at least 0.5."}
    )
    whole_text: bool = field(
        default=False, metadata={"help": "Train on prompts and observations, too, as in pretraining."}
    )
    without_tools: bool = field(default=False, metadata={"help": "Leave the tools' schemas out of the prompts."})
    held_out: float = field(
        default=0.0, metadata={"help": "Share of the problems (`question_id`) that evaluate, for want of a split."}
    )
    hidden_size: int = field(default=512, metadata={"help": "Width of a policy that is built (no model named)."})
    num_layers: int = field(default=8, metadata={"help": "Its layers."})
    vocabulary: int = field(default=4000, metadata={"help": "Tokens of its tokenizer."})


def main(script_args, training_args, model_args, dataset_args):
    from embedded.offline_values import hold_out, new_policy
    from transformers import AutoTokenizer
    from trl import SFTTrainer, get_dataset, get_peft_config, get_quantization_config

    from trl_multiturn.data import choose_split, load_rows, supervised_rows

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
    train_rows, eval_rows = choose_split(dataset, script_args.dataset_train_split), None
    if script_args.held_out:
        train_rows, eval_rows = hold_out(train_rows, script_args.held_out)
    elif training_args.eval_strategy != "no":
        eval_rows = choose_split(dataset, script_args.dataset_test_split)
    train_rows, eval_rows = select_rows(train_rows, script_args), select_rows(eval_rows, script_args)

    # Without a model, build one whose tokenizer knows the words of the rows
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = f"{training_args.output_dir}/initial_policy"
        if training_args.process_index == 0:
            conversations = (row["prompt"] + row["completion"] for row in train_rows)
            new_policy(
                conversations, model_args.model_name_or_path, script_args.hidden_size, script_args.num_layers,
                script_args.vocabulary,
            )  # fmt: skip
        training_args.distributed_state.wait_for_everyone()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)

    def labelled(rows):
        if rows is None:
            return None
        rows = supervised_rows(rows, tokenizer, training_args.dataset_num_proc)
        return rows.remove_columns("labels") if script_args.whole_text else rows

    # Initialize the trainer
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=labelled(train_rows),
        eval_dataset=labelled(eval_rows),
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )

    # Train the model
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    # Save and push to Hub
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")

    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
        trainer.accelerator.print(f"🤗 Model pushed to the Hub in https://huggingface.co/{trainer.hub_model_id}.")
    if hasattr(trainer, "end"):  # transformers >= 5.18
        trainer.end()


def select_rows(rows, script_args):
    """The rows to imitate."""
    from embedded.offline_values import without_tools

    if rows is not None and script_args.only_correct:
        rows = rows.filter(lambda row: row["label"] if "label" in row else row["reward"] >= 0.5)
    return without_tools(rows) if script_args.without_tools else rows


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import DatasetMixtureConfig, ModelConfig, SFTConfig, TrlParser

    dataclass_types = (SupervisedScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("sft", help="Run SFT on trajectories", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    script_args, training_args, model_args, dataset_args = make_parser().parse_args_and_config()
    main(script_args, training_args, model_args, dataset_args)
