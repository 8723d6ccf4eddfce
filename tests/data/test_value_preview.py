from __future__ import annotations

from trl_multiturn.data.value_preview import preview_values

from ..support import byte_tokenizer


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
