"""TRL's training templates are found by what a template does."""

from __future__ import annotations

import pytest

from tests.support import assistant, byte_tokenizer, render_actions, template_text, user
from trl_multiturn.templates import TurnTemplate


COMPLETION = [assistant("A", reasoning_content="R"), user("Q"), assistant("B", reasoning_content="S")]


@pytest.mark.parametrize("edit", ["{{- '' }}", "{# a comment #}", "{%- set unused = 1 %}"])
def test_another_text_of_the_same_template_keeps_its_training_template(edit):
    original, edited = byte_tokenizer("qwen3"), byte_tokenizer(template_text("qwen3") + edit)
    row = TurnTemplate(edited, training_template=True).tokenize([user("Q")], COMPLETION)
    assert "branches" not in row
    assert row == TurnTemplate(original, training_template=True).tokenize([user("Q")], COMPLETION)
    assert render_actions(edited, row)[0] == "<think>\nR\n</think>\n\nA<|im_end|>"


def test_a_training_template_does_not_speak_where_the_own_template_refuses():
    strict = "{% if messages[0].content == '?' %}{{ raise_exception('no') }}{% endif %}" + template_text("qwen3")
    template = TurnTemplate(byte_tokenizer(strict), training_template=True)
    assert template.tokenize([user("Q")], COMPLETION)["action_mask"][0] == 1
    with pytest.raises(ValueError, match="cannot render .* no"):
        template.tokenize([user("?")], COMPLETION)


def test_a_template_that_prompts_otherwise_is_another_template():
    other = template_text("qwen3").replace("<|im_start|>", "<|begin|>")
    row = TurnTemplate(byte_tokenizer(other), training_template=True).tokenize([user("Q")], COMPLETION)
    assert row["branches"]  # as the policy saw it, where no training template fits
