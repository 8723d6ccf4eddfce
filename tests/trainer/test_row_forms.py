"""All four trainers read rows as other tools write them as they read the form itself."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset

from tests.formats.written import ONE_CALL, PAIRS, TRAJECTORIES, pairs, rows
from tests.support import assistant, byte_tokenizer, preference_rows, save_tiny, user
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

from .helpers import dpo_config, move, preference_dataset


TRAINERS = {
    "dpo": (MultiTurnDPOTrainer, MultiTurnDPOConfig),
    "kto": (MultiTurnKTOTrainer, MultiTurnKTOConfig),
    "oreo": (OREOTrainer, OREOConfig),
    "dqo": (DQOTrainer, DQOConfig),
}
VALUES = ("oreo", "dqo")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), byte_tokenizer("qwen2_5"))


def build(name, model, folder, dataset, **settings):
    trainer, config = TRAINERS[name]
    settings = {"value_model": "head", **settings} if name in VALUES else settings
    return trainer(model, args=dpo_config(folder, config, max_length=None, **settings), train_dataset=dataset)


@pytest.fixture(scope="module")
def trainers(model, tmp_path_factory):
    dataset = Dataset.from_list(pairs(), on_mixed_types="use_json")
    return {name: build(name, model, tmp_path_factory.mktemp(name), dataset) for name in TRAINERS}


TOKENS = ("prompt_ids", "completion_ids", "action_mask", "chosen_ids", "chosen_action_mask", "rejected_ids")


def tokens(trainer, written, mixed="use_json"):
    prepared = trainer.prepare_rows(Dataset.from_list(written, on_mixed_types=mixed))
    columns = [*TOKENS, "rejected_action_mask", "reward", "label"]
    return {name: prepared[name][:] for name in columns if name in prepared.column_names}


def labelled(count):
    return [row | {"label": i != 2} for i, row in enumerate(rows()[:count])]


@pytest.fixture(scope="module")
def in_the_form(trainers):
    return {(name, count): tokens(trainers[name], labelled(count)) for name in ("kto", "oreo") for count in (2, 3)}


# Without the JSON type Arrow fills in nulls, at every depth
@pytest.mark.parametrize(("name", "mixed"), [("kto", None), ("oreo", "use_json")])
@pytest.mark.parametrize("form", TRAJECTORIES)
def test_trajectories_in_every_form(trainers, in_the_form, form, name, mixed):
    count = 2 if form in ONE_CALL else 3
    written = [{**TRAJECTORIES[form][1](row), "label": row["label"]} for row in labelled(count)]
    assert tokens(trainers[name], written, mixed) == in_the_form[name, count]


def whole(found):
    """Prompt and sides together: without a prompt, what both sides begin with is one (here with the call)."""
    sides = [zip(found["prompt_ids"], found[f"{side}_ids"], strict=True) for side in ("chosen", "rejected")]
    return [[prompt + ids for prompt, ids in side] for side in sides]


@pytest.mark.parametrize("form", PAIRS)
def test_pairs_in_every_form(trainers, form):
    written = [PAIRS[form](row) for row in pairs()]
    assert whole(tokens(trainers["dpo"], written, None)) == whole(tokens(trainers["dpo"], pairs()))
    if "both sides" not in form and "no prompt" not in form:
        assert tokens(trainers["kto"], written, None) == tokens(trainers["kto"], pairs())


def test_observations_trained_too_go_through_the_same_door(model, tmp_path):
    trainer = build("dpo", model, tmp_path, preference_dataset(2), mask_observations=False)
    written = [PAIRS["arguments as strings"](row) for row in pairs()]
    assert tokens(trainer, written, None) == tokens(trainer, pairs())
    assert all(all(mask) for mask in tokens(trainer, written)["chosen_action_mask"])


def flagged(name, **flag):
    row = rows()[0]
    row["completion"][0] |= flag
    if name == "dpo":
        return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": [assistant("No.")]}]
    return [row | {"label": True}]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}])
def test_a_turn_that_must_not_train_does_not(trainers, name, flag):
    mask = "chosen_action_mask" if name == "dpo" else "action_mask"
    ids = "chosen_ids" if name == "dpo" else "completion_ids"
    found = tokens(trainers[name], flagged(name, **flag))
    trained = [t for t, bit in zip(found[ids][0], found[mask][0], strict=True) if bit]
    assert trainers[name].processing_class.decode(trained) == "A wharf.<|im_end|>"
    unflagged = tokens(trainers[name], flagged(name))
    assert found[ids] == unflagged[ids] and sum(found[mask][0]) < sum(unflagged[mask][0])


@pytest.mark.parametrize("name", TRAINERS)
def test_only_answers(model, tmp_path, name):
    trainer = build(name, model, tmp_path, Dataset.from_list(flagged(name)), train_on_turns="answer")
    mask = "chosen_action_mask" if name == "dpo" else "action_mask"
    assert sum(trainer.train_dataset[mask][0]) == len(trainer.processing_class("A wharf.<|im_end|>").input_ids)
    calls = {"chosen_turn_calls": [1], "rejected_turn_calls": [0], "turn_calls": [1]}
    row = {"prompt_ids": [1], **{f"{s}_ids": [2, 3] for s in ("chosen", "rejected", "completion")}, "label": True}
    row |= {f"{prefix}action_mask": [1, 1] for prefix in ("", "chosen_", "rejected_")}
    with pytest.raises(ValueError, match="there is no `(chosen_)?turn_calls`"):
        trainer.prepare_rows(Dataset.from_list([row]))
    with pytest.raises(ValueError, match="No row is left"):
        trainer.prepare_rows(Dataset.from_list([row | calls]))


@pytest.mark.parametrize(
    ("name", "row", "error"),
    [
        ("oreo", {"question": "?", "gold": "!"}, "trainer reads: `prompt`, `completion`, `reward` or `prompt`"),
        (
            "kto",
            {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]},
            "They are ShareGPT",
        ),
        ("oreo", {"messages": [user("?"), assistant("!")]}, "`reward` is missing. Add the column `reward`"),
        ("dpo", {"messages": [user("?"), assistant("!")], "reward": 1.0}, "`chosen`, `rejected` is missing"),
        ("dqo", {"prompt_ids": [1], "response_ids": [2], "response_mask": [1]}, "message logs with token ids"),
    ],
)
def test_rows_of_another_kind_are_told_in_the_trainers_words(trainers, name, row, error):
    with pytest.raises(ValueError, match=error):
        trainers[name].prepare_rows(Dataset.from_list([row]))


def test_pairs_that_are_identical_from_the_start_are_dropped_and_counted(model, tmp_path):
    same = [row | {"rejected": row["chosen"]} for row in preference_rows(2)]
    trainer = build("dpo", model, tmp_path, Dataset.from_list([*preference_rows(2), *same], on_mixed_types="use_json"))
    assert len(trainer.train_dataset) == 2 and trainer.row_statistics["data/rows_dropped_identical"] == 2


# A reference of the user's own


def test_reference_log_probabilities_that_are_given_are_used(model, tmp_path):
    given = {"ref_chosen_logps": [-10.0, -20.0], "ref_rejected_logps": [-11.0, -21.0]}
    dataset = preference_dataset(2, **given)
    trainer = build("dpo", model, tmp_path, dataset, precompute_ref_log_probs=True)
    batch = next(iter(trainer.get_train_dataloader()))
    found = torch.stack([batch["ref_chosen_logps"], batch["ref_rejected_logps"]], dim=1).tolist()
    assert sorted(found) == [[-20.0, -21.0], [-10.0, -11.0]]


@pytest.mark.parametrize(
    ("given", "settings", "error"),
    [
        ({"ref_chosen_logps": [-1.0]}, {}, r"has the column \['ref_chosen_logps'\], but the reference needs"),
        (
            {"ref_chosen_logps": [math.nan], "ref_rejected_logps": [-1.0]},
            {},
            "Row 0: the reference log-probability is nan",
        ),
        (
            {"ref_chosen_logps": [-1.0], "ref_rejected_logps": [-1.0]},
            {"max_length": 200},
            "cuts 1 rows .* sums over whole",
        ),
    ],
)
def test_a_reference_that_cannot_be_used_is_refused(model, tmp_path, given, settings, error):
    settings = {"max_length": None, "precompute_ref_log_probs": True} | settings
    with pytest.raises(ValueError, match=error):
        MultiTurnDPOTrainer(model, args=dpo_config(tmp_path, **settings), train_dataset=preference_dataset(1, **given))


@pytest.mark.parametrize("name", TRAINERS)
def test_flags_count_in_packed_and_padded_batches_alike(model, tmp_path, name):
    def loss(packed, **flag):
        rows = [*flagged(name, **flag), *flagged(name)]
        trainer = build(name, model, tmp_path, Dataset.from_list(rows), packed=packed, beta=0.5)
        move(trainer.model)
        batch = next(iter(trainer.get_train_dataloader()))
        return trainer.compute_loss(trainer.model, batch).item()

    assert loss(False, train=False) == pytest.approx(loss(True, train=False), rel=1e-5)
    assert loss(False, train=False) != pytest.approx(loss(False), rel=1e-4)
