"""Trainers with a value model on tiny models, and their losses written out once more, one row at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from tests.support import byte_tokenizer, save_tiny
from trl_multiturn.segments import split_segments
from trl_multiturn.trainer import OREOTrainer
from trl_multiturn.trainer.values.value_based import ValueBasedTrainer

from .helpers import kto_config, move


BETA = 0.5


def token_rows(n: int = 4, **columns: list) -> Dataset:
    """Rows of two turns with an observation between them, of different lengths and rewards."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for i in range(n):
        turns = [3 + i, 2, 4]
        count = sum(turns)
        ids = torch.randint(60, 120, (count,), generator=generator).tolist()
        rows.append(
            {
                "prompt_ids": [65 + i, 66, 67][: 2 + i % 2],
                "completion_ids": ids,
                "action_mask": [1] * turns[0] + [0] * turns[1] + [1] * turns[2],
                "reward": [1.0, 0.0, 0.25, -0.5][i % 4],
            }
        )
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def group_rows(prompts: int = 2, each: int = 4, **columns: list) -> Dataset:
    """`each` trajectories of every prompt, of two turns, with rewards between 0 and 1."""
    generator = torch.Generator().manual_seed(11)
    rows = []
    for i in range(prompts * each):
        turns = [2 + i % each, 2, 3]
        ids = torch.randint(60, 120, (sum(turns),), generator=generator).tolist()
        rows.append(
            {
                "prompt_ids": [65 + i // each, 66, 67, 68],
                "completion_ids": ids,
                "action_mask": [1] * turns[0] + [0] * turns[1] + [1] * turns[2],
                "reward": [1.0, 0.0, 0.25, 0.0][i % 4],
                "prompt_id": i // each,
            }
        )
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def make_trainer(folder: Any, cls: type = OREOTrainer, dataset: Any = None, lora: bool = False, **settings: Any):
    """
    A trainer whose policy has left its reference and whose value model has left zero.

    Trains on `token_rows()`, or on `dataset`; on none with `dataset="rounds"`, for a callback that supplies rows.
    """
    has_values = issubclass(cls, ValueBasedTrainer)
    tokenizer = byte_tokenizer()
    path = f"{folder}/model"
    if not Path(path, "config.json").exists():
        save_tiny(path, tokenizer)
    passed = {key: settings.pop(key) for key in ("eval_dataset", "callbacks") if key in settings}
    trained = settings.pop("modules_to_save", None)
    defaults = {"beta": BETA, "lr_scheduler_type": "constant", "warmup_steps": 0}
    defaults |= {"value_lora_rank": 4} if has_values else {}
    args = kto_config(f"{folder}/out", cls._config_class, **{**defaults, **settings})
    trainer = cls(
        model=path,
        args=args,
        train_dataset=token_rows() if dataset is None else None if isinstance(dataset, str) else dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=trained) if lora else None,
        **passed,
    )
    move(trainer.model)
    if has_values:
        torch.nn.init.normal_(trainer.value_model.head.weight, generator=torch.Generator().manual_seed(3))
    return trainer


def whole_batch(trainer) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


def metrics_of(trainer) -> dict[str, float]:
    """The metrics since the last time."""
    return trainer._outcome_metrics.pop("train" if trainer.model.training else "eval")


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def split(trainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Trained parameters of the policy and of the value model."""
    both = parameters(trainer.accelerator.unwrap_model(trainer.model))
    mine = {name: p for name, p in both.items() if name.startswith("value_model.")}
    return {name: p for name, p in both.items() if name not in mine}, mine


def plain_forward(trainer, row: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities, values and exact KLs of one row's actions, from whole logits, segment by segment."""
    columns = [row[name] for name in ("prompt_ids", "completion_ids", "action_mask")]
    segments = split_segments(*columns, row.get("branches") or ())
    if len(segments) > 1:
        found: dict[str, Any] = {}
        for segment in segments:
            plain = {"prompt_ids": segment.context_ids, "completion_ids": segment.completion_ids}
            part = plain_forward(trainer, plain | {"action_mask": segment.action_mask})
            part["turns"] = [max(found.get("turns", [0])) + turn for turn in part["turns"]]
            found = {name: found.get(name, []) + values for name, values in part.items()}
        return found
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    mask = [0] * len(row["prompt_ids"]) + list(row["action_mask"])
    actions = [t - 1 for t, action in enumerate(mask) if action]
    policy = trainer.model
    logps = policy(input_ids=ids).logits[0].double().log_softmax(dim=-1)
    with torch.no_grad():
        if trainer.ref_model is not None:
            ref_logits = trainer.ref_model(input_ids=ids).logits
        else:
            with policy.disable_adapter():
                ref_logits = policy(input_ids=ids).logits
        ref = ref_logits[0].double().log_softmax(dim=-1)
    critic = trainer.value_model
    if critic.kind == "head":
        hidden = (policy.get_base_model() if hasattr(policy, "peft_config") else policy).base_model(ids)
        values = (hidden.last_hidden_state.detach() @ critic.head.weight.T)[0, :, 0]
    else:
        values = critic(ids)[0]
    return {
        "logps": [logps[t, ids[0, t + 1]] for t in actions],
        "ref_logps": [ref[t, ids[0, t + 1]] for t in actions],
        "values": [values[t].double() for t in actions],
        "kl": [(logps[t].exp() * (logps[t] - ref[t])).sum() for t in actions],
        "turns": [sum(mask[s] and not mask[s - 1] for s in range(1, t + 2)) for t in actions],
    }
