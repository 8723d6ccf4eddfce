"""Whole runs for `train_step.py`: a trainer's construction and `train()`, from token rows to the last step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from train_step_rows import Setting, SyntheticRows, any_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_multiturn import MultiTurnDPOConfig, MultiTurnDPOTrainer
from trl_multiturn.data.collators import DataCollatorForMultiTurnPreference


STEPS, PAIRS = 50, 2
BODY = dict(num_hidden_layers=4, hidden_size=256, intermediate_size=768, vocab_size=8000)


class RecordedLosses:
    """Keeps the loss of every step at full precision; the trainer's log rounds it."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("recorded", []).append(loss.item())
        return loss


class StockDPOTrainer(RecordedLosses, DPOTrainer):
    """TRL's trainer, fed with token rows and their masks; nothing else is changed."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class OurDPOTrainer(RecordedLosses, MultiTurnDPOTrainer):
    """The trainer as users have it."""


def whole_runs(scale: float, on_gpu: dict[str, Any] | None = None) -> Iterator[str]:
    """
    Rows of a Markdown table: CPU seconds of every arm, and its losses against the first arm's, step by step.

    With `on_gpu`, the model's config, the runs are on a GPU, in bfloat16 autocast, and seconds are wall-clock ones.
    """
    body = on_gpu or BODY
    rows = _rows(scale, body)
    tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
    yield (
        f"\n### run\n\n{STEPS} optimizer steps of {PAIRS} pairs, one epoch, {tokens} tokens; construction, "
        "precomputed reference, data loading, AdamW and metrics included; {num_hidden_layers} layers, hidden "
        "{hidden_size}, vocabulary {vocab_size}.\n".format(**body)
    )
    yield f"| trainer | {'s' if on_gpu else 'CPU s'} | x | largest loss difference at any step |"
    yield "| --- | --- | --- | --- |"
    first: tuple[list[float], float] | None = None
    for name, packed, precomputed in (
        ("TRL", False, False),
        ("TRL, reference precomputed", False, True),
        ("packed, reference online", True, False),
        ("packed, reference precomputed", True, True),
    ):
        losses, seconds = _run(rows, packed, precomputed, body, bool(on_gpu))
        first = first or (losses, seconds)
        difference = max(abs(a - b) for a, b in zip(first[0], losses, strict=True))
        if not difference <= (0.1 if on_gpu else 1e-4):  # NaN must not pass
            raise SystemExit(f"{name}: a loss differs by {difference:.1e} from TRL's. Nothing is reported.")
        yield f"| {name} | {seconds:.1f} | **{first[1] / seconds:.2f}** | {difference:.0e} |"


def _run(
    rows: list[dict[str, Any]], packed: bool, precomputed: bool, body: dict[str, Any], on_gpu: bool
) -> tuple[list[float], float]:
    torch.manual_seed(0)
    heads = dict(num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0)
    config = Qwen2Config(**heads | body)
    with torch.device("cuda" if on_gpu else "cpu"):
        policy, reference = Qwen2ForCausalLM(config), Qwen2ForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    common = dict(
        output_dir=tempfile.mkdtemp(), report_to="none", use_cpu=not on_gpu, bf16=on_gpu, disable_tqdm=True,
        num_train_epochs=1, per_device_train_batch_size=PAIRS, gradient_checkpointing=False, max_length=None,
        learning_rate=1e-5, logging_strategy="no", save_strategy="no", precompute_ref_log_probs=precomputed,
    )  # fmt: skip
    collator = {}
    if not packed:
        common |= dict(remove_unused_columns=False)
        collator = dict(data_collator=DataCollatorForMultiTurnPreference(pad_token_id=0))
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    trainer = (OurDPOTrainer if packed else StockDPOTrainer)(
        model=policy,
        ref_model=None if precomputed else reference,
        args=(MultiTurnDPOConfig if packed else DPOConfig)(**common),
        train_dataset=Dataset.from_list(rows),
        processing_class=any_tokenizer(),
        **collator,
    )
    trainer.train()
    seconds = clock() - start
    if len(trainer.recorded) != STEPS:
        raise SystemExit(f"{STEPS} steps were expected, {len(trainer.recorded)} were taken.")
    return trainer.recorded, seconds


def _rows(scale: float, body: dict[str, Any]) -> list[dict[str, Any]]:
    source = SyntheticRows(5, Setting("run", pairs=PAIRS * STEPS, scale=scale, body=body))
    return [
        {
            "prompt_ids": prompt,
            "chosen_ids": chosen.ids,
            "chosen_action_mask": chosen.mask,
            "rejected_ids": rejected.ids,
            "rejected_action_mask": rejected.mask,
        }
        for prompt, chosen, rejected in source.pairs()
    ]
