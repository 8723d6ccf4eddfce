"""Rows with images in the trainers: what enters the losses, what is cut, what is refused."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from tests.support import assistant, byte_tokenizer, tiny_model
from tests.trainer.helpers import _settings
from tests.vision import PROCESSORS, picture, tiny_vision_model
from trl_multiturn import preview_masks
from trl_multiturn.data.check import check_dataset
from trl_multiturn.data.supervised import supervised_rows
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


COLORS = ["red", "blue", "green", "white"]
TRAINERS = {
    "dpo": (MultiTurnDPOTrainer, MultiTurnDPOConfig),
    "kto": (MultiTurnKTOTrainer, MultiTurnKTOConfig),
    "oreo": (OREOTrainer, OREOConfig),
    "dqo": (DQOTrainer, DQOConfig),
}


def parts(role, *contents, **extra):
    """A message of text and, for `None`, image parts."""
    content = [
        {"type": "image", "text": None} if each is None else {"type": "text", "text": each} for each in contents
    ]
    return {"role": role, "content": content, **extra}


def look(answer):
    """A turn that looks, the image that it gets, and an answer."""
    return [parts("assistant", "look"), parts("tool", None, "seen", name="look"), parts("assistant", answer)]


def preference_rows():
    """Prompts with an image, sides with one of their own."""
    return [
        {
            "prompt": [parts("user", None, f"Like this, number {index}?")],
            "chosen": look(color),
            "rejected": look("no" * (index + 1)),
            "images": [picture(color)],
            "chosen_images": [picture(color, (8, 8 + index))],
            "rejected_images": [picture("black")],
        }
        for index, color in enumerate(COLORS)
    ]


def unpaired_rows():
    return [
        {
            "prompt": row["prompt"],
            "completion": row[side],
            "label": side == "chosen",
            "images": row["images"],
            "completion_images": row[f"{side}_images"],
        }
        for row, side in zip(preference_rows(), ["chosen", "rejected"] * 2, strict=True)
    ]


def build(name, folder, rows=None, family="chatml", processor=None, model=None, **kwargs):
    trainer_class, config_class = TRAINERS[name]
    processor = processor or PROCESSORS[family]()
    rows = rows or (preference_rows() if name == "dpo" else unpaired_rows())
    return trainer_class(
        model=model or tiny_vision_model(processor),
        args=config_class(**_settings(folder, kwargs)),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        processing_class=processor,
    )


def logp(trainer, row, side, prefix=""):
    """The summed log-probability of a row's side, by the processor and the model themselves."""
    processor, sampled = trainer.processing_class, row[side]
    text = processor.apply_chat_template(row["prompt"] + sampled, tokenize=False)
    images = row["images"] + row[f"{side}_images"]
    batch = processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits = trainer.model.eval()(**batch).logits[0].log_softmax(-1)
    total, at = 0.0, 0
    ids = batch["input_ids"][0].tolist()
    for message in (sampled[0], sampled[2]):
        turn = processor.tokenizer(message["content"][0]["text"] + "<|im_end|>")["input_ids"]
        at = next(i for i in range(at, len(ids)) if ids[i : i + len(turn)] == turn)
        total += sum(logits[at + i - 1, token].item() for i, token in enumerate(turn))
    return total


def test_the_sides_of_a_pair_are_scored_with_their_own_images(tmp_path):
    trainer = build("dpo", tmp_path)
    rows = trainer.compute_reference_columns(trainer.train_dataset)
    for side in ("chosen", "rejected"):
        expected = [logp(trainer, row, side) for row in preference_rows()]
        assert rows[f"ref_{side}_logps"][:] == pytest.approx(expected, abs=1e-4)


def test_mismatched_completions_bring_their_images_with_them(tmp_path):
    trainer = build("kto", tmp_path)
    own, rows = unpaired_rows(), trainer.compute_reference_columns(trainer.train_dataset)
    assert rows["ref_logps"][:] == pytest.approx([logp(trainer, row, "completion") for row in own], abs=1e-4)
    others = [
        own[i] | {name: own[j][name] for name in ("completion", "completion_images")}
        for i, j in enumerate([1, 0, 3, 2])
    ]
    assert rows["ref_KL_logps"][:] == pytest.approx([logp(trainer, row, "completion") for row in others], abs=1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_vision_tower_learns(tmp_path, name):
    kwargs = {"value_model": "full"} if name in ("oreo", "dqo") else {}
    trainer = build(name, tmp_path, max_steps=3, **kwargs)  # the first step of a value model moves its head alone
    weight = "vision_tower.encoder.layers.0.self_attn.q_proj.weight"
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if n.endswith(weight)}
    trainer.train()
    assert len(before) == 1 + bool(kwargs)
    assert all(not torch.equal(old, trainer.model.get_parameter(n)) for n, old in before.items())


def test_trls_rows_keep_their_column_of_images(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "Which?"}], "chosen": [assistant(c)], "rejected": [assistant("no")]}
        | {"image": picture(c)}
        for c in COLORS
    ]
    trainer = build("dpo", tmp_path, rows, family="llava_next")
    assert trainer.train_dataset.features["image"] == Dataset.from_list(rows).features["image"]
    assert "images" not in trainer.train_dataset.column_names
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape[0] == 4 and batch["image_sizes"].shape == (4, 2)


def test_an_image_beyond_max_length_goes_with_its_tokens(tmp_path):
    whole = build("dpo", tmp_path)
    length = len(whole.train_dataset[0]["prompt_ids"]) + len("look") + 1
    trainer = build(
        "dpo",
        tmp_path,
        [preference_rows()[0] | {"rejected": look("no")[2:], "rejected_images": []}] * 2,
        max_length=length + 3,
    )
    row = trainer.train_dataset[0]
    assert len(row["chosen_ids"]) == 5 and row["chosen_images"] == [] and len(row["images"]) == 1
    trainer.train()


def test_token_rows_bring_their_images(tmp_path):
    whole = build("dpo", tmp_path).train_dataset
    ids = ["prompt_ids", *(f"{s}_{n}" for s in ("chosen", "rejected") for n in ("ids", "action_mask", "images"))]
    trainer = build("dpo", tmp_path, whole.select_columns([*ids, "images"]))
    assert trainer.train_dataset["chosen_image_tokens"][:] == [[16]] * 4


def without_images(row):
    return {name: value for name, value in row.items() if not name.endswith("images")}


def text_only():
    tokenizer = byte_tokenizer()
    return {"processor": tokenizer, "model": tiny_model(tokenizer)}


@pytest.mark.parametrize(
    ("name", "rows", "kwargs", "error"),
    [
        ("dpo", None, {"precompute_ref_log_probs": True}, "not supported for vision datasets"),
        ("dpo", None, {"max_tokens_per_batch": 99}, "pixels of its rows stand in one tensor"),
        ("kto", preference_rows(), {}, "Unpair your dataset first"),
        ("dpo", [without_images(row) for row in preference_rows()], {}, "Row 0: .*part without an image"),
        ("dpo", [row | {"images": []} for row in preference_rows()], {}, "Row 0: .*part without an image"),
        ("dpo", [row | {"chosen_images": row["images"] * 2} for row in preference_rows()], {}, "holds 2 images, but"),
    ],
)
def test_rows_that_cannot_be_read_are_refused_before_training(tmp_path, name, rows, kwargs, error):
    with pytest.raises(ValueError, match=error):
        build(name, tmp_path, rows, **kwargs)


def test_a_model_without_vision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vision-related.*vision-language model"):
        build("dpo", tmp_path, **text_only())


def test_packing_is_refused_where_it_was_asked_for(tmp_path):
    trainer = build("dpo", tmp_path, packed=True)
    with pytest.raises(ValueError, match="cannot be packed: the processing class is multimodal"):
        trainer.train()


def test_a_check_reads_rows_with_images():
    processor = PROCESSORS["chatml"]()
    rows = [*preference_rows(), preference_rows()[0] | {"images": []}]
    report = check_dataset(Dataset.from_list(rows), processor, progress=False)
    assert report.kinds["preference"] == 4
    assert len(report.errors) == 1 and "row 4" in report.errors[0] and "without an image" in report.errors[0]


def test_a_preview_shows_size_and_thumbnail_of_an_image(tmp_path):
    preview = preview_masks(build("dpo", tmp_path), show=False)
    text = " ".join(str(preview).replace("│", " ").split())
    assert "[image 1: 24×16, 16 tokens]" in text and "[image 2: 8×8, 16 tokens]" in text and "<image>" not in text
    assert preview._repr_html_().count('src="data:image/png;base64,') == 4


def test_rows_for_imitation_cannot_hold_images():
    rows = [{name: row[name] for name in row if name != "label"} for row in unpaired_rows()]
    with pytest.raises(ValueError, match="Row 0: it shows images"):
        supervised_rows(Dataset.from_list(rows), PROCESSORS["chatml"]())
