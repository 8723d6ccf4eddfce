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
leaves the policy as it is: see below why.

Measured with these commands (2026-11-21; 288,440 parameters, 12,000 rows; 20 minutes of a shared core), none of the
660 problems seen in training, 95 % intervals from a bootstrap over problems: AUC 0.609 (0.580–0.637) over all
trajectories, and 0.586 (0.549–0.623) between correct and incorrect trajectories of the *same* problem, better than
chance in both. The run before it, the first with these settings, whose policy `tiny_policy.warm_start` had made in the
same manner, gave 0.635 (0.607–0.661) and 0.602 (0.559–0.640).

How that came about, since the same 660 problems were looked at before: recipes in which the policy moved, too, did not
tell solutions of one problem apart. With 3,000 such rows and `--learning_rate 1e-4` the AUC within a problem was 0.537
(0.492–0.578) after 188 steps and 0.509 (0.470–0.547) after 938; a model of 8 layers and 512 units, pretrained with
`sft.py` for two minutes of one H200, came to 0.562 (0.529–0.594) over all and 0.515 (0.474–0.554) within a problem on
27,224 rows at `--learning_rate 1e-5`. There even the values of training rows hardly differed (0.580 and 0.565 on
average at the end of correct and incorrect ones), while the policy's implicit rewards did (-0.05 and -0.28): what the
policy takes up, the values, which are fitted to the rest, need not hold. That is why the policy is left alone; both
runs of that are reported.

The same run with a policy that moves (`--learning_rate 1e-4` in place of `--value_warmup_steps 100000`; 2026-11-21, on
the same initial policy, rows and order) gave 0.524 (0.495–0.554) over all trajectories and 0.531 (0.488–0.573) within
a problem. Without the flag alone, so at the default `--learning_rate 5e-6`, it gave 0.563 (0.533–0.593) and 0.554
(0.510–0.591). Left alone, again on that day, it gave 0.609 and 0.586 as above, to the digit. The difference to 1e-4,
by a bootstrap over problems in pairs: 0.085 (0.047–0.124) over all and 0.055 (0.005–0.109) within a problem.

Recorded rows themselves are too few: the CPU command above gives 0.617 (0.544–0.697) and 0.550 (0.454–0.643) on 99
held-out problems, and three folds of five with the policy left alone 0.58–0.64 and 0.46–0.50: such a model learns that
short solutions belong to easy problems (shortness alone gives 0.652 and 0.450). For comparison, a linear regression on
seven numbers (steps, length, steps whose result is no integer, and of the answer its size and whether it is negative,
below 1 or no integer), fitted to rows with one mistake, gives 0.667 within a problem: there is more to know, and a
pretrained model should know it.

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
        from offline_values import load_groups, report_auc

        report_auc(load_groups(Path(training_args.output_dir)))


def train(train_dataset, held_out, script_args, training_args, model_args, dataset_args):
    from offline_values import last_values, report_auc, save_groups, scorer_of, small_policy, without_tools
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
        pages = preview_values(trainer.eval_dataset, scorer_of(trainer), trainer.processing_class, 20, show=False)
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
    from offline_values import balance, folds, hold_out
    from trl import get_dataset

    from trl_multiturn.data import load_rows

    if dataset_args.datasets:
        dataset = get_dataset(dataset_args)
    else:
        dataset = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)
    rows = dataset[script_args.dataset_train_split]
    grouped = "question_id" in rows.column_names
    if script_args.folds and not grouped:
        raise ValueError("`--folds` needs rows that say which problem they belong to. Add a column `question_id`.")
    if script_args.compare_on:
        splits = [(rows, load_rows(script_args.compare_on)["train"])]
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
