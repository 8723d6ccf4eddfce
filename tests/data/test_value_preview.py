from __future__ import annotations

import pytest

from tests.support import byte_tokenizer
from tests.trainer.value_helpers import make_trainer
from trl_multiturn.data.value_preview import preview_values


TOKENIZER = byte_tokenizer()


class Recorder:
    """Values a state by the number of its tokens, and remembers the states."""

    def __init__(self):
        self.states = []

    def score(self, sequences):
        self.states += [TOKENIZER.decode(ids) for ids in sequences]
        return [len(ids) / 20 for ids in sequences]


def row():
    prompt, pieces = "Q: ", [("one\n", 1), ("two.", 1), ("<OUT>", 0), ("done!", 1)]
    ids = [TOKENIZER(text, add_special_tokens=False).input_ids for text, _ in pieces]
    return {
        "prompt_ids": TOKENIZER(prompt, add_special_tokens=False).input_ids,
        "completion_ids": sum(ids, []),
        "action_mask": [action for part, (_, action) in zip(ids, pieces, strict=True) for _ in part],
        "reward": 0.5,
    }


def test_each_step_has_the_value_of_the_state_after_it():
    recorder = Recorder()
    preview = preview_values([row(), row()], recorder, TOKENIZER, num_rows=1, show=False)
    ((title, steps),) = preview.trajectories
    assert title == "trajectory 0 · reward 0.5"
    assert [step.text for step in steps] == ["one\n", "two.", "<OUT>", "done!"]
    # the last state is the one before the token that ends the trajectory
    assert recorder.states == ["Q: one\n", "Q: one\ntwo.", "Q: one\ntwo.<OUT>done"]
    assert [step.value for step in steps] == [7 / 20, 11 / 20, None, 20 / 20]


def test_turns_as_steps():
    preview = preview_values([row()], Recorder(), TOKENIZER, step_delimiter="turn", show=False)
    assert [step.text for step in preview.trajectories[0][1]] == ["one\ntwo.", "<OUT>", "done!"]


def test_page_and_terminal(tmp_path, capsys):
    preview = preview_values([row()], Recorder(), TOKENIZER)
    assert "0.350" in capsys.readouterr().out
    preview.save(tmp_path / "values.html")
    page = (tmp_path / "values.html").read_text(encoding="utf-8")
    assert "&lt;OUT&gt;" in page and "<OUT>" not in page
    assert page.count("hsl(") == 3


@pytest.mark.parametrize("kind", ["full", "head"])
def test_a_trainer_brings_its_rows_its_values_and_its_tokenizer(tmp_path, kind):
    trainer = make_trainer(tmp_path, value_model=kind)
    ((title, steps),) = preview_values(trainer, step_delimiter="turn", show=False).trajectories
    assert title == "trajectory 0 · reward 1.0" and [step.value is None for step in steps] == [False, True, False]
    row = trainer.train_dataset[0]
    values = trainer.value_model.standing_on(trainer.model)
    ends = [3, len(row["completion_ids"]) - 1]
    wanted = values.score([row["prompt_ids"] + row["completion_ids"][:end] for end in ends])
    assert [step.value for step in steps if step.value is not None] == pytest.approx(wanted, abs=1e-6)
    assert len(set(wanted)) == 2 and 0.0 not in wanted


def test_a_trainer_without_values_is_told_so(tmp_path):
    class DPOTrainer:
        train_dataset = eval_dataset = [row()]
        processing_class = TOKENIZER

    with pytest.raises(ValueError, match="A DPOTrainer trains no value model"):
        preview_values(DPOTrainer())
    assert preview_values(DPOTrainer(), Recorder(), show=False).trajectories  # a value model of one's own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([row()],), "Nothing was passed that values states"),
        (([row()], Recorder()), "which needs a tokenizer"),
        (([{"chosen_ids": [1]}], Recorder(), TOKENIZER), "no `prompt_ids`"),
    ],
)
def test_what_is_missing_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        preview_values(*arguments)
