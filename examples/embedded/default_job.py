"""What the online scripts use where no dataset, or no model, is named: word problems, their teacher, a tiny policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset


CONFIGS = Path(__file__).parents[1] / "configs"


def load_problems(script_args: Any, training_args: Any) -> tuple[Dataset, Dataset | None]:
    """Prompts and held-out prompts: those of `--dataset_name`, or the embedded problems."""
    from trl_multiturn.scripts.prompts import load_prompts

    from .word_problems import make_problems

    if script_args.dataset_name is not None:
        return load_prompts(script_args)
    iterations = int(training_args.num_train_epochs)
    train = make_problems((script_args.prompts_per_iteration or 250) * iterations, 1000 + training_args.seed)
    if not script_args.num_eval_prompts:
        return train, None
    return train, make_problems(script_args.num_eval_prompts, seed=0, split="test")


def load_held_out_problems(script_args: Any) -> Dataset:
    """Held-out prompts alone: those of the dataset that is named, or embedded ones."""
    from trl_multiturn.scripts.prompts import load_held_out

    from .word_problems import make_problems

    if script_args.dataset_name or script_args.eval_dataset_name:
        return load_held_out(script_args)
    return make_problems(script_args.num_eval_prompts, seed=0, split="test")


def load_policy_and_rows(arguments: Any) -> Dataset | None:
    """
    Names the embedded policy where no model is named; the conversations that `--warm_start teacher` imitates.

    The embedded policy is built, imitates the teacher on 12,000 problems, and is kept in `<output_dir>/warm_start`.
    """
    import torch

    flags, seed = arguments.warm_start, arguments.training.seed
    if arguments.model.model_name_or_path is None:
        torch.set_num_threads(1)  # so small a model gains nothing from more, and they would wait on the interpreter
        arguments.model.model_name_or_path = imitating_policy(arguments.training)
    if flags.warm_start != "teacher":
        return None
    return demonstrations(flags.warm_start_rows or 400, seed)


def demonstrations(count: int, seed: int) -> Dataset:
    """The imperfect teacher's conversations on training problems, drawn apart from the loop's."""
    from .word_problems import make_problems, teacher_trajectories

    return teacher_trajectories(make_problems(count, seed=seed), seed=seed)


def imitating_policy(training_args: Any, num_problems: int = 12000) -> str:
    """
    Builds the embedded tokenizer and policy and imitates the imperfect teacher; the folder of the result.

    A folder that holds the result already is used as it is: a run that was stopped starts from the same policy.
    """
    from .tiny_policy import build_policy, build_tokenizer, warm_start
    from .word_problems import texts

    folder = Path(training_args.output_dir, "warm_start")
    if not Path(folder, "config.json").exists():
        tokenizer = build_tokenizer(texts())
        rows = demonstrations(num_problems, training_args.seed)
        policy = build_policy(tokenizer, seed=training_args.seed)
        partial = folder.with_name("warm_start.partial")
        warm_start(policy, tokenizer, rows, str(partial), seed=training_args.seed)
        if training_args.process_index == 0:  # renamed at the end, so that the folder is whole or not there
            tokenizer.save_pretrained(partial)
            policy.save_pretrained(partial)
            partial.rename(folder)
        training_args.distributed_state.wait_for_everyone()
    return str(folder)
