"""Run on two processes by `test_sharded.py`, once with DDP and once with FSDP2: trains, and writes what came out."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, load_from_disk
from peft import LoraConfig

from tests.support import byte_tokenizer, save_tiny
from tests.trainer.helpers import dpo_config, kto_config, preference_dataset, unpaired_dataset
from tests.trainer.value_helpers import make_trainer, token_rows
from trl_multiturn import (
    DQOTrainer,
    MultiTurnDPOTrainer,
    MultiTurnKTOTrainer,
    OREOConfig,
    OREOTrainer,
    RolloutConfig,
    ToolRolloutGenerator,
    TransformersEngine,
)
from trl_multiturn.distributed.sharding import gathered_for_sampling, weights_of, whole_parameters
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.models.value_model import ValueModel
from trl_multiturn.trainer.loop.policy_weights import policy_revision, policy_weights, save_policy_weights


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def shard_on_cpu() -> None:
    """Lets accelerate take the CPU for an accelerator: it offers FSDP on those only, though torch's runs on gloo."""
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: whole.cpu().clone() for name, whole in whole_parameters(weights_of(trainer))}


def outcome(trainer: Any) -> dict[str, Any]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "wrapped": type(trainer.model_wrapped).__name__,
        "loss": losses,
        "norm": norms,
        "weights": weights(trainer),
    }


def reward(completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """A reward that tells random texts apart."""
    return [float(sum(map(ord, turns[-1]["content"])) % 2) for turns in completions]


# Training on given rows


def plain_dpo(folder: Path, **sharding: Any) -> dict[str, Any]:
    args = dpo_config(folder / "out", max_steps=3, train_sampling_strategy="sequential", **sharding)
    trainer = MultiTurnDPOTrainer(f"{folder}/model", args=args, train_dataset=preference_dataset(8))
    trainer.train()
    return outcome(trainer)


def plain_kto(folder: Path, **sharding: Any) -> dict[str, Any]:
    args = kto_config(folder / "out", max_steps=3, train_sampling_strategy="sequential", **sharding)
    trainer = MultiTurnKTOTrainer(f"{folder}/model", args=args, train_dataset=unpaired_dataset(8), peft_config=LORA)
    trainer.train()
    return outcome(trainer)


def oreo_resumed(folder: Path, **sharding: Any) -> dict[str, Any]:
    """Four steps; then again from the checkpoint after two, by a trainer whose weights are others."""
    runs = []
    for resume in (False, True):
        trainer = make_trainer(
            folder, value_model="full", kl_coef=0.5, value_learning_rate=1e-2, max_steps=4, save_steps=2,
            save_strategy="steps", train_sampling_strategy="sequential", eval_dataset=token_rows(4), **sharding,
        )  # fmt: skip
        if resume:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(0.1)
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2" if resume else None)
        runs.append(outcome(trainer))
    saved = ValueModel.from_pretrained(f"{trainer.args.output_dir}/checkpoint-4/value_model").state_dict()
    return runs[0] | {"resumed": runs[1]["weights"], "eval": trainer.evaluate()["eval_loss"], "saved_value": saved}


def dqo_head(folder: Path, **sharding: Any) -> dict[str, Any]:
    settings = {"value_model": "head", "horizon": "turn", "gradient_checkpointing": True, "max_steps": 3}
    trainer = make_trainer(
        folder, DQOTrainer, optim="sgd", train_sampling_strategy="sequential", **settings, **sharding
    )
    trainer.train()
    return outcome(trainer)


# The online loop


def online(folder: Path, trainer_class: type, args: Any, **kwargs: Any) -> dict[str, Any]:
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{i}?"}] for i in range(3)]})
    generator = ToolRolloutGenerator(
        prompts,
        reward_funcs=reward,
        config=RolloutConfig(
            num_generations=6, previous_policy_generations=2, max_turn_tokens=16, max_trajectory_tokens=160,
            dialect="fenced", seed=3,
        ),
        eval_prompts=prompts.select(range(1)),  # none for the second process
        reference=kwargs.pop("reference", "previous"),
    )  # fmt: skip
    model = f"{folder.parent.parent}/model"  # the same for both kinds, as rows name their model
    trainer = trainer_class(
        model, args=args, processing_class=byte_tokenizer("qwen2_5"), callbacks=[generator], **kwargs
    )
    trainer.train()
    rows = [load_from_disk(generator.run_folder / f"iteration_00{i}" / "training_rows").to_list() for i in range(2)]
    reports = [(r.policy_revision, r.rows, r.trajectories, r.evaluation["pass@1"]) for r in generator.reports]
    return outcome(trainer) | {
        "rows": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "reports": reports,
        "policy": policy_revision(weights_of(trainer)),
        "best": generator.best_policy,
    }


def online_dpo(folder: Path, **sharding: Any) -> dict[str, Any]:
    args = dpo_config(folder / "out", max_steps=-1, num_train_epochs=2, max_length=None, **sharding)
    result = online(folder, MultiTurnDPOTrainer, args, reference="initial")
    assert result["reports"][0][0] != result["reports"][1][0]
    return result


def online_oreo(folder: Path, **sharding: Any) -> dict[str, Any]:
    args = kto_config(
        folder / "out", OREOConfig, max_steps=-1, num_train_epochs=2, max_length=None, value_model="full",
        save_strategy="epoch", **sharding,
    )  # fmt: skip
    return online(folder, OREOTrainer, args)


# What only sharded weights have


def swapped(folder: Path, **sharding: Any) -> dict[str, Any]:
    """Snapshots, revisions and sampling of a policy that a training step has left partly gathered."""
    args = dpo_config(folder / "out", **sharding)
    trainer = MultiTurnDPOTrainer(f"{folder}/model", args=args, train_dataset=preference_dataset(4))
    engine = TransformersEngine(trainer.model, trainer.processing_class)
    model = weights_of(trainer)
    rank, path = trainer.args.process_index, folder / "policy.safetensors"
    before = weights(trainer)
    save_policy_weights(model, path)
    trainer.accelerator.wait_for_everyone()
    trainer.train()
    after, revision = weights(trainer), policy_revision(weights_of(trainer))
    trainer.compute_reference_columns(trainer.train_dataset)  # a forward pass without a backward one
    with policy_weights(weights_of(trainer), path):
        assert all(torch.equal(before[name], whole) for name, whole in weights(trainer).items())
        with gathered_for_sampling(trainer):
            text = sample(engine, 4 if rank else 1)  # at its own pace
    assert policy_revision(weights_of(trainer)) == revision
    assert all(torch.equal(after[name], whole) for name, whole in weights(trainer).items())
    if "fsdp" in sharding:
        with pytest.raises(RuntimeError, match="sharded over processes.*gathered_for_sampling"):
            sample(engine, 1)
    trainer.accelerator.wait_for_everyone()
    return {"text": text, "revision": revision}


def sample(engine: TransformersEngine, turns: int) -> list[int]:
    import asyncio

    ids: list[int] = [65]
    for turn in range(turns):
        params = SamplingParams(max_new_tokens=8, seed=turn)
        ids += asyncio.run(engine.generate(ids, params)).token_ids
    return ids[:9]


CASES = [plain_dpo, plain_kto, oreo_resumed, dqo_head, online_dpo, online_oreo, swapped]


def main(folder: Path, kind: str) -> None:
    sharding: dict[str, Any] = {"packed": False}  # with FSDP batches stay padded, which rounds otherwise
    rank = int(os.environ["RANK"])
    for case in CASES:
        if rank == 0:  # before the processes know of each other, after which only one of them would write
            save_tiny(folder / case.__name__ / "model", byte_tokenizer("qwen2_5"))
            save_tiny(folder.parent / "model", byte_tokenizer("qwen2_5"))
    if kind == "fsdp2":
        shard_on_cpu()
        sharding |= {"fsdp": True, "fsdp_config": {"version": 2}}
    for case in CASES:
        PartialState(cpu=True).wait_for_everyone()
        torch.save(case(folder / case.__name__, **sharding), folder / f"{case.__name__}.{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
