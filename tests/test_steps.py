from __future__ import annotations

import pytest

from tests.support import byte_tokenizer
from trl_multiturn.steps import step_ids


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(merges=[("Ċ", "Ċ"), (".", "Ċ"), ("Ġ", "b")])


def steps(tokenizer, text: str, delimiter: str, observations: tuple[str, ...] = ()) -> list[str]:
    """The text of each step; the given substrings are masked."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    mask = [1] * len(ids)
    for observation in observations:
        at = text.index(observation)
        mask[at : at + len(observation)] = [0] * len(observation)  # one token per byte there
    numbers = step_ids(tokenizer, ids, mask, delimiter)
    assert numbers == sorted(numbers) and len(numbers) == len(ids)
    chosen = [[i for i, n, m in zip(ids, numbers, mask, strict=True) if n == k and m] for k in range(numbers[-1] + 1)]
    return [tokenizer.decode(part) for part in chosen]


def test_lines(tokenizer):
    assert steps(tokenizer, "x=1\n\ny=2. z\nend", "line") == ["x=1\n\n", "y=2. z\n", "end"]


def test_sentences_end_at_periods_that_white_space_follows(tokenizer):
    text = "Half is 3.5. So $y=2.$ then\nthe end."
    assert steps(tokenizer, text, "sentence") == ["Half is 3.5. ", "So $y=2.$ ", "then\n", "the end."]


def test_a_delimiter_at_the_end_opens_no_empty_step(tokenizer):
    assert steps(tokenizer, "a\n", "line") == ["a\n"]


def test_a_token_across_a_boundary_belongs_to_the_first_step(tokenizer):
    assert "Ġb" in tokenizer.get_vocab()
    assert steps(tokenizer, "a. b", "sentence") == ["a. b"]  # " b" is one token, and it ends the sentence
    assert steps(tokenizer, "a. c", "sentence") == ["a. ", "c"]


def test_turns_and_observations(tokenizer):
    text = "run it<out>\n9</out>so 9\nright"
    observation = ("<out>\n9</out>",)
    assert steps(tokenizer, text, "turn", observation) == ["run it", "so 9\nright"]
    assert steps(tokenizer, text, "line", observation) == ["run it", "so 9\n", "right"]


def test_leading_observations_are_numbered_zero(tokenizer):
    ids = tokenizer("ab", add_special_tokens=False).input_ids
    assert step_ids(tokenizer, ids, [0, 1], "line") == [0, 0]


def test_an_unknown_delimiter_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'turn', 'line' or 'sentence'"):
        step_ids(tokenizer, [1], [1], "word")
