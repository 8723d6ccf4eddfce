import itertools
import math
import random

import pytest

from tests.support import byte_tokenizer
from trl_multiturn.evaluation import Estimate, evaluate_policy, majority_vote, pass_at_k, summarize
from trl_multiturn.rollout import RolloutConfig, ScriptedEngine
from trl_multiturn.trajectory import StopReason, Trajectory, Verdict
from trl_multiturn.verify import math_reward


CORRECT, INCORRECT, UNDECIDED = Verdict.CORRECT, Verdict.INCORRECT, Verdict.UNDECIDED


def trajectory(prompt, answer, verdict, stop_reason=StopReason.ANSWERED):
    content = "no idea" if answer is None else rf"\boxed{{{answer}}}"
    return Trajectory(
        prompt=[{"role": "user", "content": "?"}],
        completion=[{"role": "assistant", "content": content}],
        prompt_ids=[1],
        completion_ids=[2],
        action_mask=[1],
        stop_reason=stop_reason,
        verdict=verdict,
        info={"prompt_index": prompt},
    )


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(5, 0, 3, 0.0), (5, 5, 1, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (5, 2, 3, 0.9), (10, 3, 8, 1.0), (1, 1, 1, 1.0)],
)
def test_pass_at_k_by_hand(n, c, k, expected):
    # (5, 2, 3): of the 10 subsets of three only the one of the three wrong samples fails
    assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_pass_at_k_counts_subsets_and_survives_large_numbers():
    outcomes = [True] * 3 + [False] * 4
    for k in range(1, 8):
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at_k(7, 3, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(5000, 1, 100) == pytest.approx(0.02)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_refuses_what_has_no_meaning(n, c, k):
    with pytest.raises(ValueError, match="pass@k"):
        pass_at_k(n, c, k)


def test_pass_at_k_is_unbiased():
    rng = random.Random(0)
    p, k = 0.3, 3
    draws = [pass_at_k(6, sum(rng.random() < p for _ in range(6)), k) for _ in range(20_000)]
    assert sum(draws) / len(draws) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_votes_meet_in_canonical_form_and_ties_are_shown():
    assert majority_vote(["0.5", r"\frac{1}{2}", "2", None]) == ["1/2"]
    assert majority_vote(["3", "2", "3.0", "2"]) == ["2", "3"]
    assert majority_vote([None, "", None]) == []


def test_standard_errors_by_hand():
    estimate = Estimate.of([1.0, 0.0, 1.0, 1.0])
    assert estimate.value == 0.75
    # greedy pass@1: sqrt(p (1 - p) / (m - 1)) = sqrt(0.1875 / 3)
    assert estimate.standard_error == pytest.approx(0.25)
    # per-prompt pass@k of 0.5 and 1.0: deviations of 0.25 each, sqrt(0.125 / 2)
    assert Estimate.of([0.5, None, 1.0]) == Estimate(0.75, pytest.approx(0.25), 2)
    assert Estimate.of([1.0]).value == 1.0 and math.isnan(Estimate.of([1.0]).standard_error)
    assert math.isnan(Estimate.of([None]).value) and Estimate.of([]).num_prompts == 0


def test_standard_errors_are_those_of_repeated_experiments():
    rng = random.Random(0)

    def experiment():
        shares = [rng.betavariate(1, 2) for _ in range(60)]  # prompts differ in difficulty
        return Estimate.of(pass_at_k(8, sum(rng.random() < share for _ in range(8)), 4) for share in shares)

    estimates = [experiment() for _ in range(600)]
    mean = sum(e.value for e in estimates) / 600
    spread = math.sqrt(sum((e.value - mean) ** 2 for e in estimates) / 599)
    assert sum(e.standard_error for e in estimates) / 600 == pytest.approx(spread, rel=0.1)


def test_summary_by_hand():
    greedy = [trajectory(0, "1", CORRECT), trajectory(1, "9", INCORRECT), trajectory(2, "1", UNDECIDED)]
    samples = [
        trajectory(0, "1", CORRECT), trajectory(0, "1.0", CORRECT), trajectory(0, "7", INCORRECT),
        trajectory(1, "1", CORRECT), trajectory(1, "2", INCORRECT), trajectory(1, None, INCORRECT),
        trajectory(2, "3", INCORRECT), trajectory(2, "3", INCORRECT), trajectory(2, None, UNDECIDED),
    ]  # fmt: skip
    result = summarize(greedy, samples)
    assert (result.greedy.value, result.greedy.num_prompts) == (0.5, 2)
    # correct of decided: 2 of 3, 1 of 3, 0 of 2
    assert result.pass_at_k[1].value == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert result.pass_at_k[2].value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (result.pass_at_k[3].value, result.pass_at_k[3].num_prompts) == (1.0, 2)  # the third has two decided
    # votes: "1" wins; a tie of a right and a wrong answer; "3" wins and is wrong
    assert result.majority.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert result.counts["undecided"] == 2 and result.counts["stop:answered"] == 12
    metrics = result.metrics()
    assert set(metrics) == {
        *("pass@1", "pass@1_se", "mean@3", "mean@3_se", "pass@2", "pass@2_se", "pass@3", "pass@3_se"),
        *("maj@3", "maj@3_se", "undecided"),
    }
    assert metrics["pass@1"] == result.pass_at_1 == 0.5 and metrics["undecided"] == 2.0
    assert str(result.greedy) == "50.0 ± 50.0 %"


def test_a_majority_without_a_verdict_is_no_wrong_one():
    group = [trajectory(0, "5", UNDECIDED), trajectory(0, "5", UNDECIDED), trajectory(0, "4", INCORRECT)]
    assert summarize([], group).majority.num_prompts == 0
    silent = [trajectory(0, None, INCORRECT), trajectory(0, None, INCORRECT), trajectory(1, "1", CORRECT)]
    assert summarize([], [*silent, trajectory(1, "1", CORRECT)]).majority == Estimate(0.5, 0.5, 2)
    assert summarize([], silent[:2]).majority is None  # nobody ever answers: an environment, not a question


def test_uneven_numbers_of_samples_are_refused():
    with pytest.raises(ValueError, match="different numbers"):
        summarize([], [trajectory(0, "1", CORRECT), trajectory(0, "1", CORRECT), trajectory(1, "1", CORRECT)])


PROMPTS = [
    {"prompt": [{"role": "user", "content": f"What is {i} plus {i}?"}], "answer": str(2 * i)} for i in range(1, 5)
]
CONFIG = RolloutConfig(temperature=1.0, max_tool_calling_iterations=1, dialect="fenced")


def test_a_policy_is_evaluated_greedily_and_by_samples():
    seen = []

    def answers(prompt_text, sampling, session):
        """Greedy: right but for prompt 3. Sampled: prompt `i` is right in its first `i` samples of four."""
        seen.append(sampling.temperature)
        prompt, sample = map(int, session.split("/")[-2:])
        right = prompt != 3 if sampling.temperature == 0 else sample < prompt
        return rf"It is \boxed{{{2 * (prompt + 1) if right else 0}}}."

    engine = ScriptedEngine(answers, byte_tokenizer())
    result = evaluate_policy(PROMPTS, engine, [], math_reward, n=4, config=CONFIG, progress=False)
    assert sorted(seen) == [0.0] * 4 + [0.7] * 16
    assert result.greedy == Estimate(0.75, pytest.approx(0.25), 4)
    assert result.pass_at_k[1].value == pytest.approx((0 + 1 + 2 + 3) / 16)
    assert result.pass_at_k[2].value == pytest.approx((0 + 1 / 2 + 5 / 6 + 1) / 4)
    assert result.pass_at_k[4].value == 0.75
    assert result.majority.value == pytest.approx((0 + 0 + 0.5 + 1) / 4)
    assert len(result.trajectories) == 20 and result.counts["correct"] == 3 + 6
    assert "undecided" in result.metrics()


def test_greedy_alone():
    engine = ScriptedEngine([r"\boxed{2}"], byte_tokenizer())
    result = evaluate_policy(PROMPTS, engine, reward_funcs=math_reward, config=CONFIG, progress=False)
    assert result.metrics() == {"pass@1": 0.25, "pass@1_se": pytest.approx(0.25), "undecided": 0.0}
    assert result.pass_at_k == {} and result.majority is None


def test_undecided_prompts_leave_the_estimate_and_are_counted(caplog):
    def undecided_on_two(completions, answer, **kwargs):
        return [None if gold == "4" else 1.0 for gold in answer]

    engine = ScriptedEngine([r"\boxed{2}"], byte_tokenizer())
    result = evaluate_policy(PROMPTS, engine, reward_funcs=undecided_on_two, config=CONFIG, progress=False)
    assert (result.greedy.value, result.greedy.num_prompts) == (1.0, 3)
    assert result.metrics()["undecided"] == 1.0 and "1 of 4" in caplog.text


def test_mistakes_are_refused_before_anything_runs():
    engine = ScriptedEngine([], byte_tokenizer())
    with pytest.raises(ValueError, match="`n`"):
        evaluate_policy(PROMPTS, engine, n=0)
    with pytest.raises(ValueError, match="temperature"):
        evaluate_policy(PROMPTS, engine, n=4, temperature=0.0)
    assert engine.calls == []
