"""Mistakes that users make in datasets: refused before training, with the row, the reason and the remedy."""

from __future__ import annotations

import json
import math

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.support import TOOLS, assistant, byte_tokenizer, call, preference_rows, result, save_tiny, user
from tests.trainer.helpers import dpo_config, kto_config
from trl_multiturn.data.check import check_dataset
from trl_multiturn.data.row_checks import find_format
from trl_multiturn.data.truncation import PREFERENCE_SIDES
from trl_multiturn.trainer import MultiTurnDPOTrainer, MultiTurnKTOTrainer


TOKENIZER = byte_tokenizer("qwen2_5")
TOKENS = {"prompt_ids": [1], "chosen_ids": [2, 3], "chosen_action_mask": [1, 1], "rejected_ids": [4]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"), TOKENIZER)


def prefer(model, tmp_path, rows):
    rows = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return MultiTurnDPOTrainer(model, args=dpo_config(tmp_path), train_dataset=rows)


def label(model, tmp_path, rows):
    return MultiTurnKTOTrainer(model, args=kto_config(tmp_path), train_dataset=Dataset.from_list(rows))


def with_row_2(**changes):
    rows = [dict.fromkeys(changes) | row for row in preference_rows(4)]  # a dataset has the columns of its first row
    rows[2] |= changes
    return rows


def unpaired(**changes):
    completion = [call(1, 2), result("3"), assistant("3")]
    return [{"prompt": [user("1+2?")], "completion": completion, "label": i % 2 == 0, **changes} for i in range(4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [{"content": "hi"}]}, r"Row 2: `prompt`: message 0 has no `role`"),
        ({"prompt": []}, r"Row 2: `prompt` holds no message"),
        ({"chosen": []}, r"Row 2: `chosen`: The completion holds no message"),
        ({"chosen": None}, r"Row 2: `chosen` is None, not a list of messages"),
        ({"rejected": [assistant(None)]}, r"Row 2: `rejected`: message 0 \(assistant\) has neither `content` nor"),
        ({"tools": "[{name: add}]"}, r"Row 2: `tools` is no valid JSON \(.*: '\[\{name: add\}\]'"),
        ({"tools": json.dumps(TOOLS[0])}, r"Row 2: `tools` is \{'type'.*Wrap a single schema in a list"),
        ({"tools": json.dumps(["add"])}, r"Row 2: `tools` is \['add'\], but chat templates take a list of JSON"),
        ({"chat_template_kwargs": "enable_thinking=False"}, r"Row 2: `chat_template_kwargs` is 'enable_thinking"),
        ({"margin": math.nan}, r"Row 2: the margin is nan, which would make the loss of its whole batch NaN"),
        ({"margin": math.inf}, r"Row 2: the margin is inf"),
    ],
)
def test_a_bad_preference_row_is_named(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prefer(model, tmp_path, with_row_2(**changes))


def test_a_one_turn_row_that_no_template_renders_is_named(model, tmp_path):
    # One-turn rows fall back on TRL's tokenization, whose errors would name neither row nor column
    template = "{% if messages[0].content == '?' %}{{ raise_exception('no') }}{% endif %}" + TOKENIZER.chat_template
    row = {"prompt": [user("?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    rows = [row | {"chat_template_kwargs": {"chat_template": template}}]
    with pytest.raises(ValueError, match="Row 0: `chosen`: The chat template cannot render"):
        prefer(model, tmp_path, rows)


def test_a_row_of_text_among_messages_is_named(model, tmp_path):
    mixed = [preference_rows(1)[0], {"prompt": "hi", "chosen": "a", "rejected": "b"}]
    trainer = prefer(model, tmp_path, IterableDataset.from_generator(lambda: iter(mixed)))
    with pytest.raises(ValueError, match="Row 1: `prompt` is 'hi', not a list of messages"):
        list(trainer.train_dataset)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "?", "good": "a", "bad": "b"}], "the columns `question`, `good`, `bad`, which are rows of no"),
        ([TOKENS], "`prompt_ids` is there, but not `rejected_action_mask`"),
        (
            [{"prompt": "hi", "chosen": [assistant("a")], "rejected": [assistant("b")]}],
            "Text in `prompt`, but messages",
        ),
    ],
)
def test_columns_of_no_format_are_told(model, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        prefer(model, tmp_path, rows)


def test_a_mask_that_is_missing_in_one_row_is_told(model, tmp_path):
    good = TOKENS | {"rejected_action_mask": [1]}
    with pytest.raises(ValueError, match="Row 1: `chosen_action_mask` has 0 entries but `chosen_ids` has 2"):
        prefer(model, tmp_path, [good, good | {"chosen_action_mask": None}])


@pytest.mark.parametrize("bad", ["good", "True", 0.3, None, 2])
def test_a_label_that_says_neither_good_nor_bad_is_named(model, tmp_path, bad):
    with pytest.raises(ValueError, match=f"Row 0: the label is {bad!r}, but it says whether the completion is good"):
        label(model, tmp_path, unpaired(label=bad))
    report = check_dataset(Dataset.from_list(unpaired(label=bad, reward=1.0)), TOKENIZER, progress=False)
    assert len(report.errors) == (0 if bad is None else 4)  # without a label it is a trajectory with a reward


@pytest.mark.parametrize("good", [0, 1, 1.0, True])
def test_numbers_that_are_labels_are_labels(model, tmp_path, good):
    assert label(model, tmp_path, unpaired(label=good)).train_dataset["label"][:] == [good] * 4


def test_unpaired_rows_without_labels_are_told(model, tmp_path):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in unpaired()]
    reads = "this trainer reads: `chosen`, `rejected` or `prompt`, `completion`, `label` "
    with pytest.raises(ValueError, match=f"rows of no format that {reads}"):
        label(model, tmp_path, rows)
    tokens = {"prompt_ids": [1], "completion_ids": [2], "action_mask": [1]}
    with pytest.raises(ValueError, match="token rows of the train dataset have no `label`"):
        label(model, tmp_path, [tokens])


def test_rows_of_pairs_taken_apart_have_their_own_numbers(model, tmp_path):
    with pytest.raises(ValueError, match=r"Row 2: `chosen`: The completion holds no"):
        label(model, tmp_path, with_row_2(chosen=[]))


def test_without_an_assistant_turn_the_role_is_named_as_a_cause(model, tmp_path):
    rows = [row | {"chosen": [user("4")]} for row in preference_rows(2)]
    with pytest.raises(ValueError, match="see that completions hold turns with the role `assistant`"):
        prefer(model, tmp_path, rows)


def test_the_format_is_that_of_the_first_row():
    def formats(row):
        return find_format(row, [("chosen", "rejected")], PREFERENCE_SIDES, "train")

    assert formats({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}) == "text"
    assert formats({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}) == "messages"
    assert formats(TOKENS | {"rejected_action_mask": [1], "chosen": "as read"}) == "tokens"


def test_columns_that_nobody_reads_may_hold_anything(model, tmp_path):
    pairs = [row | {"completion": "raw"} for row in preference_rows(2)]
    text = [{"prompt": "a", "chosen": "b", "rejected": "c", "completion": [user("a")], "label": i} for i in range(2)]
    assert len(prefer(model, tmp_path, pairs).train_dataset) == len(prefer(model, tmp_path, text).train_dataset) == 2
    both = [row | {"label": True} for row in pairs]  # taken apart, as the parent does
    assert len(label(model, tmp_path, both).train_dataset) == 4
    assert check_dataset(Dataset.from_list(pairs), TOKENIZER, progress=False).errors == []


def test_check_names_ids_of_another_tokenizer():
    row = TOKENS | {"rejected_action_mask": [1], "chosen_ids": [2, 10**6]}
    report = check_dataset(Dataset.from_list([row]), TOKENIZER, progress=False)
    assert "train, row 0: `chosen_ids` or `prompt_ids` holds the token 1000000" in report.errors[0]


def test_check_takes_ids_beyond_a_gap():
    """Some tokenizers leave ids out, so that their last token's is larger than their size says."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "<|end|>": 9})))
    row = TOKENS | {"chosen_ids": [1, 9], "rejected_ids": [9], "rejected_action_mask": [1]}
    assert len(tokenizer) == 3 and check_dataset(Dataset.from_list([row]), tokenizer, progress=False).errors == []
    other = check_dataset(Dataset.from_list([row | {"rejected_ids": [10]}]), tokenizer, progress=False)
    assert "holds the token 10, but the tokenizer ends at 9" in other.errors[0]


def test_check_reads_an_empty_prompt():
    row = {"prompt": [], "completion": [assistant("hi")], "label": True}
    report = check_dataset(Dataset.from_list([row]), TOKENIZER, progress=False)
    assert report.errors == [
        "train, row 0: `prompt` holds no message, so there is nothing to answer. Give it a user's turn."
    ]
