"""Rollouts that see images: in prompts, and from tools."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from tests.support import byte_tokenizer
from tests.vision import PROCESSORS, picture, tiny_vision_model
from trl_multiturn import (
    RolloutConfig,
    ScriptedEngine,
    TransformersEngine,
    ValueModel,
    Verdict,
    build_preference_dataset,
    build_unpaired_dataset,
    generate_trajectories,
)
from trl_multiturn.engines.engine import Generation
from trl_multiturn.errors import UnsupportedOutput
from trl_multiturn.messages.images import open_image
from trl_multiturn.trainer.values.value_rows import trajectory_rows


def camera(code: str):
    """Takes a picture.

    Args:
        code: Where to look.
    """
    return [picture("blue", (8, 8)), "taken"]


camera.__name__ = "python"
CONFIG = dict(dialect="fenced", num_generations=2, max_turn_tokens=24, max_tool_calling_iterations=1, seed=3)
ASK = [{"prompt": [{"role": "user", "content": "Which color?"}]}]
CALL = "```python\nlook\n```"


@pytest.fixture(scope="module")
def processor():
    return PROCESSORS["chatml"]()


class Room:
    """An environment that is seen."""

    def reset(self, **row):
        return [picture("red"), "A room."]

    def act(self, action: str):
        """Acts.

        Args:
            action: What to do.
        """
        return [picture("blue", (8, 8)), f"After {action}."]


class Looks:
    """An engine whose first turn takes a picture, and whose others are sampled after it."""

    weights = "shared"

    def __init__(self, engine, processor, first=CALL, seen=0):
        self.engine, self.processing_class, self.first, self.seen = engine, processor, first, seen
        self.release, self.refresh, self.describe = engine.release, engine.refresh, engine.describe

    async def generate(self, prompt_ids, sampling, *, session=None):
        return await self.generate_with_images(prompt_ids, [], sampling)

    async def generate_with_images(self, prompt_ids, images, sampling):
        if len(images) > self.seen:
            return await self.engine.generate_with_images(prompt_ids, images, sampling)
        ids = self.processing_class.tokenizer(self.first + "<|im_end|>")["input_ids"]
        return Generation(ids, [-1.0] * len(ids), "stop")


def roll_out(processor, rows, engine, tools=(camera,), factory=None, **settings):
    return generate_trajectories(
        Dataset.from_list(rows),
        engine,
        tools,
        RolloutConfig(**CONFIG | settings),
        environment_factory=factory,
        processing_class=processor,
    )


@pytest.fixture(scope="module")
def model(processor):
    return tiny_vision_model(processor).eval()


@pytest.fixture(scope="module")
def trajectories(processor, model):
    return roll_out(processor, ASK, Looks(TransformersEngine(model, processor), processor))


@pytest.fixture(scope="module")
def trajectory(trajectories):
    return trajectories[0]


def scored(model, processor, trajectory, images):
    """Log-probabilities of a completion's tokens."""
    ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    logps = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(trajectory.prompt_ids) - 1 :]


def test_a_turn_after_an_image_is_sampled_from_what_the_trainer_scores(model, processor, trajectory):
    logps = scored(model, processor, trajectory, [picture("blue", (8, 8))])
    _, (start, end) = trajectory.turn_spans()
    assert trajectory.logps[start:end] == pytest.approx(logps[start:end].tolist(), abs=1e-4)


def test_an_image_of_a_tool_is_context_with_its_tokens(processor, trajectory):
    context = [t for t, bit in zip(trajectory.completion_ids, trajectory.action_mask, strict=True) if not bit]
    assert processor.tokenizer.decode(context) == (
        "\n<|im_start|>user\n" + "<image>" * 16 + "```output\ntaken\n```<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_an_environment_shows_is_context_and_what_is_sampled_after_it_is_not(processor, model):
    engine = Looks(TransformersEngine(model, processor), processor, first="Action: go", seen=1)
    trajectory = roll_out(processor, ASK, engine, (), Room, dialect="action")[0]
    first, shown = "Action: go<|im_end|>", "\n<|im_start|>user\n" + "<image>" * 16 + "After go.<|im_end|>\n"
    expected = processor.tokenizer(first + shown + "<|im_start|>assistant\n")["input_ids"]
    own = len(processor.tokenizer(first)["input_ids"])
    ids, mask = trajectory.completion_ids, trajectory.action_mask
    assert ids[: len(expected)] == expected and len(ids) > len(expected)
    assert mask == [1] * own + [0] * (len(expected) - own) + [1] * (len(ids) - len(expected))
    logps = scored(model, processor, trajectory, [picture("red"), picture("blue", (8, 8))])
    assert trajectory.logps[len(expected) :] == pytest.approx(logps[len(expected) :].tolist(), abs=1e-4)


def test_what_an_environment_shows_at_its_reset_joins_the_prompt(processor):
    engine = Looks(ScriptedEngine([], processor.tokenizer), processor, first="Action: go", seen=2)
    trajectory = roll_out(processor, ASK, engine, (), Room, dialect="action")[0]
    text = processor.tokenizer.decode(trajectory.prompt_ids)
    assert text == "<|im_start|>user\nWhich color?" + "<image>" * 16 + "A room.<|im_end|>\n<|im_start|>assistant\n"


def test_trajectories_with_images_are_json(trajectory):
    again = type(trajectory).from_dict(json.loads(json.dumps(trajectory.to_dict())))
    [part] = [part for part in again.completion[1]["content"] if part["type"] == "image"]
    assert open_image(part["image"]).size == (8, 8) and again == trajectory


def test_rows_of_trajectories_bring_the_images(trajectories):
    won, lost = trajectories[0].judged(Verdict.CORRECT, 1.0), trajectories[1].judged(Verdict.INCORRECT, 0.0)
    row = build_unpaired_dataset([won, lost])[0]
    assert row["images"] == [] and [open_image(image).size for image in row["completion_images"]] == [(8, 8)]
    pairs = build_preference_dataset([won, lost])
    assert [len(pairs[name][0]) for name in ("images", "chosen_images", "rejected_images")] == [0, 1, 1]


def test_prompts_show_the_images_of_their_rows(processor, model):
    rows = [{"prompt": [{"role": "user", "content": "Which?"}], "images": [picture("red")]}]
    engine = TransformersEngine(model, processor)
    trajectory = roll_out(processor, rows, engine)[0]
    assert processor.tokenizer.decode(trajectory.prompt_ids).count("<image>") == 16
    start, end = next(trajectory.turn_spans())
    logps = scored(model, processor, trajectory, [picture("red")])
    assert trajectory.logps[start:end] == pytest.approx(logps[start:end].tolist(), abs=1e-4)


def test_an_engine_that_reads_text_alone_is_refused(processor):
    with pytest.raises(UnsupportedOutput, match="`ScriptedEngine` reads text alone"):
        roll_out(processor, ASK, ScriptedEngine([CALL, "done"], processor.tokenizer))


def test_a_tokenizer_alone_cannot_show_an_image():
    tokenizer = byte_tokenizer()
    with pytest.raises(UnsupportedOutput, match="image that a tool returned cannot be shown"):
        roll_out(tokenizer, ASK, ScriptedEngine([CALL, "done"], tokenizer))


def test_what_scores_ids_alone_refuses_those_of_images(model, trajectory):
    ids = [trajectory.prompt_ids + trajectory.completion_ids]
    value_model = ValueModel.from_policy(model, "full")
    with pytest.raises(ValueError, match="holds image tokens, but what is to score it is given no images"):
        value_model.score(ids)
    assert len(value_model.score([trajectory.prompt_ids])) == 1


def test_a_value_model_alone_is_not_trained_on_images(trajectory):
    with pytest.raises(ValueError, match="A trajectory shows images"):
        trajectory_rows([trajectory.judged(Verdict.CORRECT, 1.0)], binary_outcomes=True)
