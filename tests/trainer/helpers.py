"""Trainers on tiny models, and summed log-ratios written out once more, one row at a time."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.support import assistant, preference_rows, user
from trl_multiturn.trainer import MultiTurnDPOConfig, MultiTurnKTOConfig


def preference_dataset(n: int = 4, **columns: list) -> Dataset:
    dataset = Dataset.from_list(preference_rows(n), on_mixed_types="use_json")
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def unpaired_dataset(n: int = 4) -> Dataset:
    sides = ["chosen", "rejected"]
    rows = [
        {"prompt": row["prompt"], "completion": row[sides[i % 2]], "label": i % 2 == 0}
        for i, row in enumerate(preference_rows(n))
    ]
    return Dataset.from_list(rows, on_mixed_types="use_json")


def one_turn_dataset(n: int = 4) -> Dataset:
    rows = [
        {
            "prompt": [user(f"Say {i}")],
            "chosen": [assistant(f"Well: {i}" * (i + 1))],
            "rejected": [assistant("No")],
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


def _settings(folder: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    defaults = dict(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        learning_rate=1e-2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    return {**defaults, **kwargs}


def dpo_config(folder: Any, cls: type = MultiTurnDPOConfig, **kwargs: Any):
    return cls(**_settings(folder, kwargs))


def kto_config(folder: Any, cls: type = MultiTurnKTOConfig, **kwargs: Any):
    return cls(**_settings(folder, kwargs))


def move(model: torch.nn.Module, scale: float = 0.02, seed: int = 1) -> None:
    """Moves the trainable weights, so that the policy differs from its reference and no log-ratio is 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def reference_model(folder: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def token_logps(model: torch.nn.Module, prompt: list[int], ids: list[int], mask: list[int]) -> torch.Tensor:
    """Log-probabilities in nats of the masked tokens of `ids` after `prompt`: no padding, no fused head."""
    tokens = torch.tensor([prompt + ids])
    logits = model(input_ids=tokens).logits[0, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return logps[torch.tensor(([0] * len(prompt) + mask)[1:]).bool()]


def log_ratio(model, reference, prompt, ids, mask, alpha: float = 1.0, shared: int | None = None) -> torch.Tensor:
    """Summed log-ratio; of the tokens beyond the first `shared` only the part `alpha` counts."""
    with torch.no_grad():
        ref = token_logps(reference, prompt, ids, mask)
    ratios = token_logps(model, prompt, ids, mask) - ref
    return ratios.sum() if shared is None else ratios[:shared].sum() + alpha * ratios[shared:].sum()


def pair_log_ratios(model, reference, rows, alpha: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rows,)` summed log-ratios of the chosen and of the rejected sides of prepared rows."""
    sides = {"chosen": [], "rejected": []}
    for row in rows:
        shared = min(sum(row["chosen_action_mask"]), sum(row["rejected_action_mask"]))
        for side, values in sides.items():
            columns = row["prompt_ids"], row[f"{side}_ids"], row[f"{side}_action_mask"]
            values.append(log_ratio(model, reference, *columns, alpha, shared))
    return torch.stack(sides["chosen"]), torch.stack(sides["rejected"])


def batch_of(trainer, dataset: Dataset | None = None) -> dict[str, torch.Tensor]:
    """All prepared rows as one batch, with the columns that the trainer's dataloader would keep."""
    dataset = trainer.train_dataset if dataset is None else dataset
    trainer._set_signature_columns_if_needed()
    keep = [name for name in dataset.column_names if name in trainer._signature_columns]
    return trainer._prepare_inputs(trainer.data_collator(list(dataset.select_columns(keep))))


def batch_loss(trainer, dataset: Dataset | None = None) -> torch.Tensor:
    """The loss that the trainer computes on all prepared rows as one batch."""
    return trainer.compute_loss(trainer.model, batch_of(trainer, dataset))


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]
