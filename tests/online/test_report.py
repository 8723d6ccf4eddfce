"""The table of a run: what became of every rollout, and in which words."""

from collections import Counter

from trl_multiturn import PythonTool
from trl_multiturn.online.report import IterationReport, explain_reasons, print_iterations
from trl_multiturn.online.settings import IterationSettings
from trl_multiturn.rollout.judging import Judge
from trl_multiturn.rows.selection import PairingConfig, UnpairedConfig
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import FILTERS


def rollout(verdict, **info):
    return Trajectory([], [], [1], [2], [1], StopReason.ANSWERED, verdict=verdict, info=info)


def look(key: str) -> str:
    """
    Looks.

    Args:
        key: Key.
    """
    return key


def test_every_rollout_is_in_a_row_or_told_why_not(capsys):
    report = IterationReport(0, rows=1)
    for verdict, dropped, unused in (
        (Verdict.CORRECT, None, None),
        (Verdict.INCORRECT, None, None),
        (Verdict.CORRECT, "turn_without_code", None),
        (Verdict.CORRECT, None, "in_no_pair"),
        (Verdict.CORRECT, None, "in_no_pair"),
        (Verdict.UNDECIDED, "undecided", None),
    ):
        errors = {"reward_errors": {"f": "ValueError"}} if verdict is Verdict.UNDECIDED else {}
        report.count(rollout(verdict, **errors), dropped, unused)
    assert report.dropped == {"turn_without_code": 1, "undecided": 1} and report.unused == {"in_no_pair": 2}
    assert report.trajectories == 2 * report.rows + sum((Counter(report.dropped) + Counter(report.unused)).values())
    assert report.reward_errors == report.metrics()["rollout/reward_errors"] == 1
    assert report.metrics()["data/unused_in_no_pair"] == 2
    print_iterations([report])
    printed = capsys.readouterr().out
    assert "turn_without_code 1" in printed and "in_no_pair 2" in printed
    assert f"turn_without_code: {FILTERS['turn_without_code'].description}" in printed
    assert "in_no_pair: the prompt's pairs are of others" in printed


def test_reasons_are_explained_and_those_of_the_users_own_filters_passed_over():
    assert len(explain_reasons(FILTERS)) == len(FILTERS)
    assert explain_reasons(["mine", "undecided"]) == [
        "undecided: no verdict: a reward function said `None`, raised, or was late"
    ]


def test_filters_about_code_are_on_where_the_tools_include_an_interpreter():
    def filters(tools, pairing):
        settings = IterationSettings(tools, Judge(look), pairing=pairing)
        settings.choose_filters()
        return settings.pairing.filters

    def run(code: str) -> str:
        """
        Runs a program.

        Args:
            code: The program.
        """
        return code

    assert filters([PythonTool()], PairingConfig()) == ["error_before_answer", "over_length", "turn_without_code"]
    assert filters([look, run], PairingConfig()) == ["error_before_answer", "over_length", "turn_without_code"]
    assert filters([look], PairingConfig()) == ["over_length"]
    assert filters([look], PairingConfig(filters=["turn_without_code"])) == ["turn_without_code"]
    assert filters([PythonTool()], PairingConfig(filters=[])) == []
    assert filters([PythonTool()], UnpairedConfig()) == []
