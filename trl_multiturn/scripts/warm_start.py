"""A policy that learns tools and format before the first iteration: by imitating rows, or its own successes (RAFT)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig, SFTTrainer, get_peft_config

from ..data.loading import load_split
from ..data.supervised import supervised_rows
from ..distributed.pace import at_own_pace
from ..engines.engine import Engine
from ..journal.journal import Journal
from ..rollout.config import RolloutConfig
from ..rollout.dialects.choice import choose_dialect
from ..rollout.dialects.dialect import Dialect, WritesTools
from ..rollout.loop import generate_trajectories
from ..rows.row_files import write_rows
from ..rows.selection import UnpairedConfig, select_by_prompt
from ..tools.base import tool_schema
from .arguments import OnlineArguments
from .sampling import engine_factory, load_model


def warm_started(
    arguments: OnlineArguments, prompts: Dataset, tools: Sequence[Any], demonstrations: Dataset | None = None
) -> str:
    """
    The policy that the first iteration starts from: `--warm_start` applied to `--model_name_or_path`.

    Under LoRA an adapter is trained and merged, so that the online loop starts with a new one.

    Args:
        arguments ([`OnlineArguments`]):
            The script's arguments.
        prompts (`Dataset`):
            What `--warm_start rollouts` samples from.
        tools (`list`):
            What the policy may call.
        demonstrations (`Dataset`, *optional*):
            Conversations to imitate, in place of those that `--warm_start` names.

    Returns:
        `str`: the model as named where there is no warm start, else `<output_dir>/warm_start`. A folder that holds
        the result is used as it is, so that a stopped run starts from the same policy.

    Raises:
        `ValueError`: if the model is to be quantized, or no rollout is correct, so that there is nothing to imitate.
    """
    training, flags = arguments.training, arguments.warm_start
    if flags.warm_start is None:
        return str(arguments.model.model_name_or_path)
    if arguments.model.load_in_4bit or arguments.model.load_in_8bit:
        raise ValueError(
            "A warm start trains and saves whole weights, which a quantized model does not have. Warm start without "
            "`--load_in_4bit` and `--load_in_8bit`, then pass the folder as `--model_name_or_path`."
        )
    folder = Path(training.output_dir, "warm_start")
    if not Path(folder, "config.json").exists():
        partial = folder.with_name("warm_start.partial")
        _imitate(arguments, prompts, tools, demonstrations, partial)
        if training.process_index == 0:  # renamed at the end, so that the folder is whole or not there
            partial.rename(folder)
        training.distributed_state.wait_for_everyone()
    return str(folder)


def _imitate(
    arguments: OnlineArguments,
    prompts: Dataset,
    tools: Sequence[Any],
    demonstrations: Dataset | None,
    folder: Path,
) -> None:
    """Trains the policy and writes it to `folder`."""
    training, flags, name = arguments.training, arguments.warm_start, str(arguments.model.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=arguments.model.model_revision,
        attn_implementation=arguments.model.attn_implementation,
        dtype=arguments.model.dtype,
    ).to(training.device)
    if demonstrations is None and flags.warm_start == "rollouts":
        rows = _own_successes(arguments, prompts, tools, model, tokenizer, folder)
    else:
        rows = load_split(str(flags.warm_start)) if demonstrations is None else demonstrations
        rows = _as_in_the_loop(rows, arguments.rollout, tokenizer, tools)
    rows = rows.select(range(min(flags.warm_start_rows or len(rows), len(rows))))
    dialect = _dialect(arguments.rollout, tokenizer, tools)
    tool_dialect = dialect.tool_dialect if isinstance(dialect, WritesTools) else None
    trainer = SFTTrainer(
        model=model,
        args=_sft_config(arguments, folder),
        train_dataset=supervised_rows(rows, tokenizer, tool_dialect=tool_dialect),
        processing_class=tokenizer,
        peft_config=get_peft_config(arguments.model),
    )
    trainer.accelerator.print(f"Warm start on {len(rows)} conversations.")
    trainer.train()
    trainer.save_model(str(folder))
    if arguments.model.use_peft and training.process_index == 0:
        load_model(folder, dtype=arguments.model.dtype).merge_and_unload().save_pretrained(folder)
        for adapter in folder.glob("adapter_*"):
            adapter.unlink()
    trainer.accelerator.wait_for_everyone()


_SHARED = (
    "bf16",
    "dataloader_pin_memory",
    "ddp_timeout",
    "disable_tqdm",
    "fp16",
    "fsdp",
    "fsdp_config",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "logging_steps",
    "report_to",
    "seed",
    "use_cpu",
)


def _sft_config(arguments: OnlineArguments, folder: Path) -> SFTConfig:
    training, flags = arguments.training, arguments.warm_start
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=flags.warm_start_learning_rate,
        num_train_epochs=flags.warm_start_epochs,
        per_device_train_batch_size=flags.warm_start_batch_size or training.per_device_train_batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        max_length=None,
        save_strategy="no",
        **{name: getattr(training, name) for name in _SHARED},
    )


def _own_successes(
    arguments: OnlineArguments, prompts: Dataset, tools: Sequence[Any], model: Any, tokenizer: Any, folder: Path
) -> Dataset:
    """Token rows of the policy's own verified rollouts."""
    training, flags = arguments.training, arguments.warm_start
    engine = engine_factory(arguments.engine, arguments.model, arguments.rollout)(model, tokenizer)
    rows = verified_rows(
        prompts.select(range(min(flags.warm_start_prompts, len(prompts)))),
        engine,
        tools,
        arguments.script.reward_funcs,
        replace(arguments.rollout, num_generations=flags.warm_start_generations, previous_policy_generations=0),
        UnpairedConfig(strategy="winners", max_positives=flags.warm_start_winners, seed=training.seed),
        folder,
        training,
    )
    if hasattr(engine, "close"):  # the loop starts its own, with the policy that comes out
        engine.close()
    return rows


def verified_rows(
    prompts: Dataset,
    engine: Engine,
    tools: Sequence[Any],
    reward_funcs: Any,
    config: RolloutConfig,
    winners: UnpairedConfig,
    folder: Path,
    training: TrainingArguments,
) -> Dataset:
    """
    Rolls out and keeps what the verifier accepts (RAFT; the baseline of the M-DPO paper 2409.02392, section 3.1).

    Each process rolls out its share; what is finished is kept in `<folder>/journal`, the rows in `<folder>/rows`.

    Args:
        prompts (`Dataset`), engine ([`Engine`]), tools (`list`), reward_funcs, config ([`RolloutConfig`]):
            As in [`generate_trajectories`].
        winners ([`UnpairedConfig`]):
            How many of a prompt are kept, and which.
        folder (`Path`):
            Where journal and rows are written.
        training ([`~transformers.TrainingArguments`]):
            Process index, number of processes, time limit.

    Returns:
        `Dataset`: token rows.

    Raises:
        `ValueError`: if no rollout is correct.
    """
    share = range(training.process_index, len(prompts), training.world_size)
    with Journal(folder / "journal") as journal, at_own_pace(training.ddp_timeout):
        if share:
            generate_trajectories(
                prompts.select(share),
                engine,
                tools=list(tools),
                config=config,
                reward_funcs=reward_funcs,
                prompt_indices=list(share),
                journal=journal,
                collect=False,  # they are in the journal
                progress=training.process_index == 0 and not training.disable_tqdm,
            )
    if training.process_index == 0:
        found = select_by_prompt(journal.read_by_prompt(), winners)
        write_rows((selection for _, selection in found), folder / "rows", "unpaired")
    training.distributed_state.wait_for_everyone()
    rows = load_from_disk(folder / "rows")
    if len(rows) == 0:
        raise ValueError(
            f"None of {len(prompts) * config.num_generations} rollouts is correct, so there is nothing to imitate. "
            "Give the policy worked examples (`--num_shots`), easier problems, more rollouts of each, or "
            f"conversations to imitate. The rollouts are in {folder / 'journal'}."
        )
    return rows


def _dialect(config: RolloutConfig, tokenizer: Any, tools: Sequence[Any]) -> Dialect:
    """What the rollouts speak."""
    return choose_dialect(config.dialect, tokenizer, [tool_schema(tool) for tool in tools], config)


def _as_in_the_loop(rows: Dataset, config: RolloutConfig, tokenizer: Any, tools: Sequence[Any]) -> Dataset:
    """Conversations with the system message, the tools and the template's arguments that the rollouts have."""
    shown = _dialect(config, tokenizer, tools).template_tools

    def complete(row: dict[str, Any]) -> dict[str, Any]:
        opening = "messages" if "messages" in row else "prompt"
        messages = row[opening]
        if config.system_prompt and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system_prompt}, *messages]
        extra: dict[str, Any] = {"tools": json.dumps(shown)} if shown and not row.get("tools") else {}
        if config.chat_template_kwargs and not row.get("chat_template_kwargs"):
            extra["chat_template_kwargs"] = config.chat_template_kwargs
        return {opening: messages, **extra}

    return rows.map(complete)
