"""The online loop under a template that strips thinking: what was read and sampled is what is trained."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.support import byte_tokenizer, tiny_model, user
from trl_multiturn import (
    MultiTurnDPOConfig,
    MultiTurnDPOTrainer,
    OREOConfig,
    OREOTrainer,
    PairingConfig,
    RolloutConfig,
    ToolRolloutGenerator,
    TransformersEngine,
    UnpairedConfig,
)
from trl_multiturn.segments import path


TOKENIZER = byte_tokenizer("qwen3")
STOPS = [chr(code) for code in range(33, 127) if code % 9 == 0]  # a random policy hardly ever ends a turn by itself


class Witness(TransformersEngine):
    """Keeps what was read and sampled in each turn."""

    async def generate(self, prompt_ids, sampling, **kwargs):
        generation = await super().generate(prompt_ids, sampling, **kwargs)
        self.turns = [*getattr(self, "turns", []), (prompt_ids, generation.token_ids)]
        return generation


def look(text: str) -> str:
    """Looks.

    Args:
        text: Where.
    """
    return "nothing"


def odd_lengths_win(completion_ids, **columns):
    return [float(len(ids) % 2) for ids in completion_ids]


def trained_turns(row, name, mask, branches):
    """What the policy reads and is trained on, turn by turn."""
    ids, bits = row["prompt_ids"] + row[name], [0] * len(row["prompt_ids"]) + row[mask] + [0]
    for start in range(len(ids)):
        if bits[start] and not bits[start - 1]:
            stop = next(column for column in range(start, len(bits)) if not bits[column])
            yield [ids[column] for column in path(row.get(branches) or (), start)], ids[start:stop]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["m-dpo", "oreo"])
def test_ids_sampled_are_ids_trained(tmp_path, algorithm):
    trainer_class, config_class, pairing, sides = {
        "m-dpo": (
            *(MultiTurnDPOTrainer, MultiTurnDPOConfig, PairingConfig(filters=[], max_pairs_per_prompt=2)),
            [(f"{side}_ids", f"{side}_action_mask", f"{side}_branches") for side in ("chosen", "rejected")],
        ),
        "oreo": (
            *(OREOTrainer, OREOConfig, UnpairedConfig("all")),
            [("completion_ids", "action_mask", "branches")],
        ),
    }[algorithm]
    engines = []

    def engine(model, processing_class):
        engines.append(Witness(model, processing_class))
        return engines[-1]

    generator = ToolRolloutGenerator(
        Dataset.from_list([{"prompt": [user(f"{number}?")]} for number in range(2)]),
        tools=[look],
        reward_funcs=[odd_lengths_win],
        config=RolloutConfig(
            num_generations=4, dialect="action", action_prefix="", stop_strings=STOPS, max_turn_tokens=60,
            max_tool_calling_iterations=2, max_trajectory_tokens=1000, seed=3,
        ),
        pairing=pairing,
        engine=engine,
    )  # fmt: skip
    args = config_class(
        output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=2, logging_steps=1, packed=True,
        report_to="none", bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=None,
        gradient_checkpointing=False,
    )  # fmt: skip
    model = tiny_model(TOKENIZER)
    trainer = trainer_class(model, args=args, processing_class=TOKENIZER, callbacks=[generator])
    trainer.train()

    sampled = [turn for each in engines for turn in each.turns]
    rows = list(trainer.train_dataset)
    trained = [turn for row in rows for side in sides for turn in trained_turns(row, *side)]
    assert trained and all(turn in sampled for turn in trained)
    assert any(row.get(branches) for row in rows for *_, branches in sides)
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    # The trainer's own log-probabilities of the sampled tokens, along their segments, are the engine's
    assert logged["sampling/sampling_logp_difference/max"] < 1e-4
