"""Between the flags of an online script and the loop: the callback that is built, and the end of a run."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from ..callbacks import ToolRolloutGenerator
from ..data.preview import preview_masks
from ..evaluation import evaluate_policy
from ..online.endings import where_to_look
from .arguments import OnlineArguments, PromptArguments
from .prompts import load_shots, with_shots
from .sampling import engine_factory, load_policy
from .shots import python_shots


def shots_of(script: PromptArguments, rollout: Any, model: str, tools: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """The worked examples that `--num_shots` and `--shots_name` ask for."""
    if script.num_shots < 1:
        return []
    if script.shots_name:
        return load_shots(script.shots_name, script.num_shots)
    return python_shots(script.num_shots, rollout, AutoTokenizer.from_pretrained(model), tools)


def in_front(
    arguments: OnlineArguments, prompts: Dataset, eval_prompts: Dataset | None, tools: Sequence[Any]
) -> tuple[Dataset, Dataset | None]:
    """Prompts and held-out prompts with the worked examples that the flags ask for."""
    shots = shots_of(arguments.script, arguments.rollout, str(arguments.model.model_name_or_path), tools)
    return with_shots(prompts, shots), None if eval_prompts is None else with_shots(eval_prompts, shots)


def rollout_generator(
    arguments: OnlineArguments, prompts: Dataset, eval_prompts: Dataset | None, tools: Sequence[Any]
) -> ToolRolloutGenerator:
    """The loop that the flags ask for: a callback in place of a training set."""
    script = arguments.script
    return ToolRolloutGenerator(
        prompts,
        tools=list(tools),
        reward_funcs=script.reward_funcs,
        config=arguments.rollout,
        pairing=arguments.pairing,
        reference=script.reference,
        history=script.history,
        prompts_per_iteration=script.prompts_per_iteration,
        eval_prompts=eval_prompts,
        eval_generations=script.eval_generations,
        max_policy_lag=script.max_policy_lag,
        lr_schedule=script.lr_schedule,
        engine=engine_factory(arguments.engine, arguments.model, arguments.rollout),
        log_completions=script.log_completions,
        num_completions_to_print=script.num_completions_to_print,
    )


def init_kwargs(arguments: OnlineArguments) -> dict[str, Any]:
    """`model_init_kwargs` of a trainer that loads the policy by name."""
    model = arguments.model
    return dict(
        revision=model.model_revision,
        attn_implementation=model.attn_implementation,
        dtype=model.dtype,
        **(arguments.training.model_init_kwargs or {}),
    )


def train_and_save(trainer: Any, generator: ToolRolloutGenerator, arguments: OnlineArguments) -> None:
    """
    Trains, shows what was trained on, saves the best policy, and measures it once more as any user would load it.

    A run that was stopped goes on from its last checkpoint and its finished rollouts.
    """
    training, accelerator = arguments.training, trainer.accelerator
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or True)

    # What was trained on: green tokens are the policy's own, the rest is context
    if accelerator.is_main_process and len(trainer.train_dataset):
        preview_masks(trainer)

    trainer.save_model(training.output_dir)
    accelerator.print(f"💾 {what_was_saved(generator)} is in {training.output_dir}.")
    if generator.held_out is not None and accelerator.is_main_process:
        reload_and_evaluate(generator, arguments, accelerator.device)


def finish(trainer: Any, generator: ToolRolloutGenerator, arguments: OnlineArguments) -> None:
    """Pushes what was saved to the Hub if that is asked for, says where to look at the run, and ends the trainer."""
    if arguments.training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
    trainer.accelerator.print(where_to_look(generator.run, arguments.training.output_dir))
    trainer.end()


def run_script(main: Callable[[OnlineArguments], None], arguments: OnlineArguments) -> None:
    """Runs a script; Ctrl-C ends it with what the run says about it, and without a traceback (status 130)."""
    try:
        main(arguments)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def what_was_saved(generator: ToolRolloutGenerator) -> str:
    """Which policy a run ends with, in words."""
    if not any(report.trained_rows for report in generator.reports):
        return "No iteration found a row to train on; the policy, unchanged,"
    best = generator.best_policy
    if best is None:
        return "The policy of the last iteration"
    if best == 0:
        return "No iteration was better on the held-out prompts; the policy before the first one"
    return f"The best policy, that of iteration {best},"


def reload_and_evaluate(generator: ToolRolloutGenerator, arguments: OnlineArguments, device: Any) -> None:
    """Loads the saved policy and prints pass@1, which is the one that was measured in the run."""
    from ..engines.transformers.engine import TransformersEngine

    policy, tokenizer = load_policy(arguments.training.output_dir, device)
    engine = TransformersEngine(policy, tokenizer, arguments.engine.rollout_batch_size)
    settings, held_out = generator.settings, generator.held_out
    assert held_out is not None  # whoever calls has looked
    result = evaluate_policy(
        held_out.prompts,
        engine,
        settings.tools,
        arguments.script.reward_funcs,
        config=settings.rollout,
    )
    print(f"Reloaded: pass@1 {result.greedy} on {result.greedy.num_prompts} held-out prompts.")
