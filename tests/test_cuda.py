"""Trainers, engine and loop on a GPU: the packed path against the padded one, and what only a device can break."""

from __future__ import annotations

import asyncio

import pytest
import torch
from datasets import Dataset

from tests.packing.test_value_based import branching_rows
from tests.support import byte_tokenizer, save_tiny, tiny_model
from tests.trainer.helpers import dpo_config, kto_config, preference_dataset, unpaired_dataset
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.transformers.engine import TransformersEngine
from trl_multiturn.trainer import (
    DQOConfig,
    DQOTrainer,
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    MultiTurnKTOConfig,
    MultiTurnKTOTrainer,
    OREOConfig,
    OREOTrainer,
)


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TRAINERS = {
    "dpo": (MultiTurnDPOTrainer, MultiTurnDPOConfig, dpo_config, preference_dataset, {}),
    "kto": (MultiTurnKTOTrainer, MultiTurnKTOConfig, kto_config, unpaired_dataset, {}),
    "oreo": (OREOTrainer, OREOConfig, kto_config, branching_rows, dict(value_model="adapter", kl_coef=0.1)),
    "oreo-full": (OREOTrainer, OREOConfig, kto_config, branching_rows, dict(value_model="full")),
    "dqo": (DQOTrainer, DQOConfig, kto_config, branching_rows, dict(value_model="head", lam=0.9)),
}


def losses(kind: str, folder, dataset: Dataset | None = None, **settings) -> list[float]:
    """Of three steps, at full precision."""
    cls, config, settings_of, rows, own = TRAINERS[kind]
    tokenizer = byte_tokenizer()
    save_tiny(f"{folder}/model", tokenizer)
    recorded = []

    class Recording(cls):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            recorded.append(loss.item())
            return loss

    args = settings_of(folder, config, **{**dict(use_cpu=False, max_steps=3, learning_rate=1e-3), **own, **settings})
    trainer = Recording(
        model=f"{folder}/model", args=args, train_dataset=rows() if dataset is None else dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert next(trainer.model.parameters()).is_cuda == (not args.use_cpu)
    if settings.get("packed"):
        assert all(forward.calls["packed"] for forward in trainer._packed_forwards)
    return recorded


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TRAINERS)
def test_three_steps_on_the_gpu_equal_three_on_the_cpu(kind, checkpointing, tmp_path):
    on_cpu = losses(kind, tmp_path, use_cpu=True, packed=False)
    for packed in (True, False):
        on_gpu = losses(kind, tmp_path, packed=packed, gradient_checkpointing=checkpointing)
        assert on_gpu == pytest.approx(on_cpu, rel=2e-4, abs=2e-5), packed


@pytest.mark.parametrize("kind", TRAINERS)
def test_three_steps_in_bfloat16(kind, tmp_path):
    exact, padded, packed = (
        losses(kind, tmp_path, packed=False),
        losses(kind, tmp_path, packed=False, bf16=True),
        losses(kind, tmp_path, packed=True, bf16=True),
    )
    scale = max(map(abs, exact))
    assert packed == pytest.approx(padded, abs=0.03 * scale)
    assert packed == pytest.approx(exact, abs=0.03 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_samples_from_the_model_on_the_gpu(dtype):
    tokenizer = byte_tokenizer()
    model = tiny_model(tokenizer).to("cuda", dtype)
    engine = TransformersEngine(model, tokenizer)
    prompts = [[60 + i] * (5 + 7 * i) for i in range(6)]

    async def together():
        return await asyncio.gather(
            *(engine.generate(p, SamplingParams(max_new_tokens=12, seed=i)) for i, p in enumerate(prompts))
        )

    for prompt, reply in zip(prompts, asyncio.run(together()), strict=True):
        ids = torch.tensor([prompt + reply.token_ids], device="cuda")
        with torch.no_grad():
            scores = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        expected = scores.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist()
        assert reply.logps == pytest.approx(expected, abs=1e-4 if dtype == torch.float32 else 5e-2)
