"""What a model wrote steers no terminal: previews, reports and tables show its control characters."""

import pytest
from datasets import Dataset

from tests.support import byte_tokenizer
from trl_multiturn import preview_masks
from trl_multiturn.data.check import CheckReport, print_check
from trl_multiturn.data.value_preview import preview_values
from trl_multiturn.messages.terminal import visible
from trl_multiturn.online.diagnosis import transcript
from trl_multiturn.online.report import IterationReport, print_iterations
from trl_multiturn.trajectory import StopReason, Trajectory
from trl_multiturn.verify.reward_calls import brief_error


CLEARS = "\x1b[2J\x1b]0;title\x07"  # clears the screen, renames the window
REVERSED = "\u202egnp.exe\u2069"
HOSTILE = f"so {CLEARS}{REVERSED}\rover \x9b31m and \x7f"
SHOWN = r"so \x1b[2J\x1b]0;title\x07\u202egnp.exe\u2069\rover \x9b31m and \x7f".replace(r"\r", r"\x0d")
TOKENIZER = byte_tokenizer("qwen2_5")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("a\nb\tc", "a\nb\tc"),
        ("12 × ½ ≤ π — 数学 العربية", "12 × ½ ≤ π — 数学 العربية"),
        ("👩\u200d🔬 नमस्\u200dते", "👩\u200d🔬 नमस्\u200dते"),
        ("\u2028\ufeff\u200b\xad", r"\u2028\ufeff\u200b\xad"),
        ("\ud83d\U000e0041", r"\ud83d\U000e0041"),
        ("", ""),
    ],
)
def test_control_characters_are_shown_and_words_stay(text, shown):
    assert visible(text) == shown


def row():
    ids = TOKENIZER.encode(HOSTILE)
    return {"prompt_ids": [1], "completion_ids": ids, "action_mask": [1] * len(ids), "label": True}


class Values:
    def score(self, sequences):
        return [0.5] * len(sequences)


def sent(capsys):
    out, err = capsys.readouterr()
    return out + err


def check_report():
    print_check(CheckReport(errors=[HOSTILE], warnings=[HOSTILE], notes=[HOSTILE]))


@pytest.mark.parametrize(
    "show",
    [
        lambda: preview_masks([row()], 1, TOKENIZER),
        lambda: preview_values([row()], Values(), TOKENIZER),
        check_report,
        lambda: print_iterations([IterationReport(0, dropped={HOSTILE: 1})]),
        lambda: print(transcript(trajectory())),
        lambda: print(brief_error(ValueError(HOSTILE))),
    ],
    ids=["masks", "values", "check", "report", "diagnosis", "errors"],
)
def test_nothing_that_steers_is_sent(show, capsys):
    show()
    text = sent(capsys)
    assert r"\x1b[2J" in text.replace("\n", "") and r"\u202e" in text.replace("\n", "")
    assert not {"\x1b", "\x07", "\r", "\x7f", "\x9b", "\u202e", "\u2069"} & set(text)


def trajectory():
    message = {"role": "assistant", "content": HOSTILE}
    return Trajectory([{"role": "user", "content": HOSTILE}], [message], [1], [2], [1], StopReason.ANSWERED)


def test_markup_of_rich_in_a_text_is_text(capsys):
    print_iterations([IterationReport(0, dropped={"[bold]x[/bold]": 1})])
    assert "[bold]x[/bold] 1" in sent(capsys)


def test_a_page_of_a_preview_shows_them_too():
    rows = Dataset.from_list([row()])
    assert "\u202e" not in preview_masks(rows, 1, TOKENIZER, show=False)._repr_html_()
    assert "\u202e" not in preview_values(rows, Values(), TOKENIZER, show=False)._repr_html_()
