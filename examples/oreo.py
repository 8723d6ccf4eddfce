# /// script
# dependencies = ["trl-multiturn"]
# ///

"""
OREO on recorded trajectories: a policy and a value model trained together towards the soft Bellman equation.

`examples/prepare_real_data.py` writes the rows from recorded solutions. Any unpaired TRL dataset with a `label` or a
`reward` will do: the name of one on the Hub, or a JSONL or Parquet file.

# Full training
```bash
accelerate launch examples/oreo.py \
    --model_name_or_path Qwen/Qwen2.5-Math-1.5B \
    --dataset_name data/gsm8k_trajectory.jsonl \
    --value_model full --learning_rate 5e-6 --num_train_epochs 1 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
    --output_dir Qwen2.5-Math-1.5B-OREO
```

# LoRA, policy and value model on one backbone
```bash
accelerate launch examples/oreo.py \
    --model_name_or_path Qwen/Qwen2.5-Math-7B \
    --dataset_name data/gsm8k_trajectory.jsonl \
    --use_peft --lora_r 64 --lora_alpha 64 --value_model adapter --learning_rate 1e-5 --value_learning_rate 1e-4 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
    --output_dir Qwen2.5-Math-7B-OREO-LoRA
```

# CPU, without a download: a small policy is built and warm-started on the rows first
```bash
python examples/oreo.py \
    --dataset_name data/gsm8k_trajectory.jsonl --balanced False \
    --value_model full --learning_rate 2e-4 --value_learning_rate 2e-3 \
    --num_train_epochs 1 --per_device_train_batch_size 16 --use_cpu --bf16 False --gradient_checkpointing False \
    --report_to none --save_strategy no --output_dir outputs/oreo
```

With `question_id` in the rows, the script prints how well the value of a trajectory's last state tells correct from
incorrect answers to problems that did not train, and writes `values.html`, the value after each step of some of them.
The problems are a share of them (`--held_out`), those of the rows in `--compare_on`, or with `--folds 5` all of them,
each held out once.

# CPU, values that know right from wrong: learned on problems that are not those they are judged on
```bash
python examples/sft.py \
    --dataset_name data/gsm8k_train_trajectory.jsonl --only_correct --whole_text --without_tools \
    --hidden_size 80 --num_layers 2 --vocabulary 2000 \
    --learning_rate 4e-3 --lr_scheduler_type cosine --warmup_steps 20 --num_train_epochs 1 \
    --per_device_train_batch_size 16 --train_sampling_strategy group_by_length \
    --use_cpu --bf16 False --gradient_checkpointing False --report_to none --save_strategy no \
    --output_dir outputs/language_model
python examples/oreo.py \
    --model_name_or_path outputs/language_model --without_tools \
    --dataset_name data/gsm8k_train_trajectory.jsonl --compare_on data/gsm8k_trajectory.jsonl --num_problems 6000 \
    --value_model full --value_learning_rate 1e-3 --value_warmup_steps 100000 --kl_coef 0 \
    --num_train_epochs 1 --per_device_train_batch_size 16 --train_sampling_strategy group_by_length \
    --use_cpu --bf16 False --gradient_checkpointing False --report_to none --save_strategy no \
    --output_dir outputs/values
```

The rows that train are gold solutions of 6,000 training problems and as many with one mistake; those that compare are
2,640 recorded solutions of four models to 660 other problems. A warm-up of the value model that outlasts the training
leaves the policy as it is.

Measured so (2026-11-21): between correct and incorrect solutions of the same problem, AUC 0.586 (0.549–0.623);
`benchmarks/results/values.md` tells how that came about.

With `--folds 5` every problem of the rows is held out once; `--fold 2` trains one fold, so that folds may run beside
each other, and each prints the figures of all that are finished. On a GPU leave out `--use_cpu --bf16 False`; with a
pretrained model leave out `sft.py` and `--without_tools`.
"""

import argparse
import copy
from dataclasses import dataclass, field
from pathlib import Path

from trl import ScriptArguments


@dataclass
class OREOScriptArguments(ScriptArguments):
    """TRL's script arguments, and which problems train and which are held out."""

    held_out: float = field(
        default=0.15,
        metadata={"help": "Share of the problems on which values are compared with outcomes; 0 for none."},
    )
    compare_on: str | None = field(
        default=None, metadata={"help": "Rows of other problems on which to compare, in place of a share."}
    )
    balanced: bool = field(
        default=True,
        metadata={"help": "Train on as many correct as incorrect rows of each problem (with `question_id`)."},
    )
    num_problems: int | None = field(
        default=None, metadata={"help": "Train on so many problems; all by default (with `balanced`)."}
    )
    folds: int = field(
        default=0, metadata={"help": "Hold each problem out once: so many trainings, in place of one share."}
    )
    fold: int | None = field(
        default=None, metadata={"help": "Train this fold only, from 0; folds may run beside each other."}
    )
    initial_value_model: str | None = field(
        default=None, metadata={"help": "Folder of a value model of the same kind from which to go on."}
    )
    without_tools: bool = field(
        default=False, metadata={"help": "Leave the tools' schemas out of the prompts, as for a small model."}
    )


def main(script_args, training_args, model_args, dataset_args):
    splits = load_rows_apart(script_args, dataset_args)
    if not script_args.folds:
        train(*splits[0], script_args, training_args, model_args, dataset_args)
        return
    for fold in range(script_args.folds) if script_args.fold is None else [script_args.fold]:
        fold_args, fold_model_args = copy.deepcopy(training_args), copy.copy(model_args)
        fold_args.output_dir = f"{training_args.output_dir}/fold_{fold}"
        train(*splits[fold], script_args, fold_args, fold_model_args, dataset_args)
    if training_args.process_index == 0:
        from embedded.offline_values import load_groups, report_auc

        report_auc(load_groups(Path(training_args.output_dir)))


def train(train_dataset, held_out, script_args, training_args, model_args, dataset_args):
    from embedded.offline_values import last_values, report_auc, save_groups, small_policy, without_tools
    from trl import get_peft_config, get_quantization_config

    from trl_multiturn import OREOTrainer, preview_masks
    from trl_multiturn.data.value_preview import preview_values

    # Without a model, build a small one
    if script_args.without_tools or model_args.model_name_or_path is None:
        train_dataset, held_out = without_tools(train_dataset), without_tools(held_out)
    if model_args.model_name_or_path is None:
        model_args.model_name_or_path = small_policy(train_dataset, f"{training_args.output_dir}/initial_policy")
    training_args.model_init_kwargs = dict(
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        dtype=model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    )

    # Initialize the trainer
    trainer = OREOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if script_args.initial_value_model:
        trainer.value_model.load_weights(script_args.initial_value_model)

    # Look at what is trained before training
    if trainer.accelerator.is_main_process:
        preview_masks(trainer)

    # Train the model
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if held_out is not None and trainer.accelerator.is_main_process:
        groups = last_values(trainer, trainer.eval_dataset)
        save_groups(groups, Path(training_args.output_dir, "values.jsonl"))
        report_auc(groups)
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


def load_rows_apart(script_args, dataset_args):
    """Pairs of rows that train and rows of other problems (or `None`): one pair, or one for each fold."""
    from embedded.offline_values import balance, folds, hold_out
    from trl import get_dataset

    from trl_multiturn.data import choose_split, load_rows, load_split

    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    rows = choose_split(dataset, script_args.dataset_train_split)
    grouped = "question_id" in rows.column_names
    if script_args.folds and not grouped:
        raise ValueError("`--folds` needs rows that say which problem they belong to. Add a column `question_id`.")
    if script_args.compare_on:
        splits = [(rows, load_split(script_args.compare_on))]
    elif script_args.folds:
        splits = folds(rows, script_args.folds)
    elif grouped and script_args.held_out:
        splits = [hold_out(rows, script_args.held_out)]
    else:
        splits = [(rows, None)]
    if grouped and script_args.balanced:
        splits = [(balance(rows, script_args.num_problems), held_out) for rows, held_out in splits]
    return splits


def make_parser(subparsers: argparse._SubParsersAction | None = None, prog: str | None = None):
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from trl_multiturn import OREOConfig

    dataclass_types = (OREOScriptArguments, OREOConfig, ModelConfig, DatasetMixtureConfig)
    if subparsers is not None:
        return subparsers.add_parser("oreo", help="Run the OREO script", dataclass_types=dataclass_types)
    return TrlParser(dataclass_types, prog=prog)


if __name__ == "__main__":
    script_args, training_args, model_args, dataset_args = make_parser().parse_args_and_config()
    main(script_args, training_args, model_args, dataset_args)
