"""Prefixes completed by a scripted policy: what it reads, what its tools remember, and what the steps are worth."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rollout.notebook import TOKENIZER, Notebook, boxed, code, policy
from tests.support import user
from trl_multiturn.data.value_rows import finish_rows
from trl_multiturn.rollout import RolloutConfig, ScriptedEngine, generate_trajectories
from trl_multiturn.rollout.prefix_completion import (
    Prefix,
    complete_prefixes,
    estimate_step_rewards,
    reward_longest_good_prefix,
)
from trl_multiturn.rows.pairing import UnpairedConfig, build_unpaired_dataset
from trl_multiturn.tools import PythonTool
from trl_multiturn.trajectory import Verdict
from trl_multiturn.verify import math_reward


CONFIG = RolloutConfig(dialect="fenced", num_generations=1)
ROWS = [{"prompt": [user("Question?")], "answer": "7"}]
QUIET = {"reward_funcs": math_reward, "progress": False}

RECORDED = [code("x = 1\nprint('one', x)"), code("x += 10\nprint('more', x)"), boxed(0)]


def recorded(script=RECORDED, tool=None, rows=ROWS):
    engine = ScriptedEngine(script, TOKENIZER, logp=-0.25)
    return generate_trajectories(rows, engine, [tool or Notebook()], CONFIG, **QUIET)


def starts(trajectory):
    """Where the policy begins its turns."""
    return [start for start, _ in trajectory.turn_spans()]


@pytest.mark.parametrize("tool", [Notebook, PythonTool])
def test_the_interpreter_is_as_the_prefix_left_it(tool):
    tool = tool()
    (trajectory,) = recorded(tool=tool)
    asked = code("print('x is', x)")
    engine = policy({"output\none": [asked], "output\nmore": [asked], "output\nx is": [boxed(7)]})
    after_one, after_two = complete_prefixes(
        [Prefix(trajectory, start) for start in starts(trajectory)[1:]], ROWS, engine, [tool], CONFIG, 2, **QUIET
    )
    outputs = [[c.completion[-2]["content"] for c in group] for group in (after_one, after_two)]
    assert outputs == [["```output\nx is 1\n```"] * 2, ["```output\nx is 11\n```"] * 2]
    for completion in (*after_one, *after_two):
        length = completion.info["prefix_tokens"]
        assert completion.completion_ids[:length] == trajectory.completion_ids[:length]
        assert completion.action_mask[:length] == trajectory.action_mask[:length]
        assert completion.logps[:length] == trajectory.logps[:length]
        assert completion.verdict is Verdict.CORRECT
        assert completion.info["replays_differ"] == 0 and completion.info["prompt_index"] == 0
    assert after_two[0].completion[:4] == trajectory.completion[:4]
    # what was sampled was sampled after exactly the recorded ids
    first = min(engine.calls, key=lambda call: len(call.prompt_ids))
    assert first.prompt_ids == trajectory.prompt_ids + trajectory.completion_ids[: starts(trajectory)[1]]
    if isinstance(tool, PythonTool):
        assert not tool.sandbox._sessions
        tool.close()
    else:
        assert tool.open_now == 0


def test_a_prefix_may_end_inside_a_turn():
    (trajectory,) = recorded(["Let me see.\nIt is 3.\n" + boxed(3)])
    cut = len(TOKENIZER.encode("Let me see.\n"))
    engine = ScriptedEngine(lambda *_: "It is 7: " + boxed(7), TOKENIZER, logp=-1.0)
    ((completion,),) = complete_prefixes([Prefix(trajectory, cut)], ROWS, engine, [Notebook()], CONFIG, 1, **QUIET)
    assert completion.completion == [{"role": "assistant", "content": "Let me see.\nIt is 7: " + boxed(7)}]
    assert completion.logps[: cut + 1] == [-0.25] * cut + [-1.0]
    assert completion.num_turns == 1 and completion.verdict is Verdict.CORRECT
    assert engine.calls[0].sampling.max_new_tokens == CONFIG.max_turn_tokens - cut


def test_calls_begun_in_the_prefix_are_run_when_the_turn_ends():
    (trajectory,) = recorded()
    cut = starts(trajectory)[1] + len(TOKENIZER.encode("```python\nx += 10\n"))
    rest = "print('now', x)\n```"
    engine = ScriptedEngine(lambda text, *_: boxed(7) if "now" in text.split("output")[-1] else rest, TOKENIZER)
    ((completion,),) = complete_prefixes([Prefix(trajectory, cut)], ROWS, engine, [Notebook()], CONFIG, 1, **QUIET)
    assert completion.completion[3]["content"] == "```output\nnow 11\n```"


def test_equal_prefixes_are_completed_once():
    one, two = recorded(rows=ROWS * 2)
    assert one.info["prompt_index"] != two.info["prompt_index"]
    twin = replace(one, reward=0.5)
    engine = ScriptedEngine(lambda *_: boxed(7), TOKENIZER)
    start = starts(one)[1]
    prefixes = [Prefix(trajectory, start) for trajectory in (one, twin, two)]
    a, b, c = complete_prefixes(prefixes, ROWS * 2, engine, [Notebook()], CONFIG, 3, **QUIET)
    assert len(engine.calls) == 6 and [len(group) for group in (a, b, c)] == [3, 3, 3]
    assert [group[0].info["prompt_index"] for group in (a, b, c)] == [0, 0, 1]


# From the last observation on: how often each prefix reaches 7
FROM = {
    "output\none": [boxed(7), boxed(7), boxed(7), boxed(1)],
    "output\nmore": [boxed(1), boxed(7), boxed(1), boxed(1)],
}


@pytest.mark.parametrize(("estimate", "values"), [("soft", [0.75, 0.25, 0.0]), ("hard", [1.0, 1.0, 0.0])])
def test_step_rewards_by_hand(estimate, values):
    (trajectory,) = recorded()
    (labelled,) = estimate_step_rewards(
        [trajectory], ROWS, policy(FROM), [Notebook()], CONFIG, estimate=estimate, num_completions=4, **QUIET
    )
    rewards = labelled.info["step_rewards"]
    assert rewards["values"] == values  # the last step's is the trajectory's own verdict
    assert rewards["ends"] == [stop for _, stop in trajectory.turn_spans()]
    assert replace(labelled, info=trajectory.info) == trajectory


def test_what_could_not_be_judged_has_no_reward():
    (trajectory,) = recorded()
    undecided = replace(trajectory, verdict=Verdict.UNDECIDED, reward=None)
    (labelled,) = estimate_step_rewards(
        [undecided], ROWS, policy(FROM), [Notebook()], CONFIG, num_completions=4, progress=False,
        reward_funcs=lambda completions, **_: [None] * len(completions),
    )  # fmt: skip
    assert labelled.info["step_rewards"]["values"] == [None, None, None]


def test_the_longest_prefix_with_a_correct_completion_is_rewarded():
    failed = recorded()[0]
    solved = recorded([*RECORDED[:2], boxed(7)])[0]
    unknown = replace(failed, verdict=Verdict.UNDECIDED, reward=None)
    hopeless = {"output\none": [boxed(7)], "output\nmore": [boxed(1)]}

    def rewards(trajectories, tree):
        engine = policy(tree)
        found = reward_longest_good_prefix(
            trajectories, ROWS, engine, [Notebook()], CONFIG, num_completions=4, **QUIET
        )
        return [[round(r, 3) for r in t.info["turn_rewards"]] for t in found], len(engine.calls)

    # two good steps of three: the search stops at the first prefix from the end that reaches 7
    assert rewards([failed, solved, unknown], FROM) == ([[0.333, 0.333, 0], [0.333] * 3, [0, 0, 0]], 4)
    assert rewards([failed], hopeless) == ([[0.333, 0, 0]], 8)
    assert rewards([failed], {"": [boxed(1)]}) == ([[0, 0, 0]], 8)


def test_rewards_of_lines_reach_the_tokens_that_end_them():
    text = "So.\nThus.\n" + boxed(3)
    (failed,) = recorded([text])

    def script(prompt_text, *_):  # from the first line it can still be solved, from the second not
        return boxed(7) if prompt_text.endswith("So.\n") else boxed(3)

    (rewarded,) = reward_longest_good_prefix(
        [failed], ROWS, ScriptedEngine(script, TOKENIZER), [Notebook()], CONFIG, delimiter="line",
        num_completions=2, **QUIET,
    )  # fmt: skip
    ends = [len(TOKENIZER.encode(text[: text.index(line) + len(line)])) - 1 for line in ("So.\n", "Thus.\n")]
    assert rewarded.info["process_rewards"][:2] == [[ends[0], pytest.approx(1 / 3)], [ends[1], 0.0]]
    rows = build_unpaired_dataset([rewarded], UnpairedConfig(strategy="all"))
    finished, _ = finish_rows(rows, TOKENIZER, max_length=None)
    paid = finished[0]["token_rewards"]
    assert paid[ends[0]] == pytest.approx(1 / 3) and sum(paid) == pytest.approx(1 / 3)


def test_prefixes_after_which_nothing_is_sampled_are_refused():
    (trajectory,) = recorded()
    engine = ScriptedEngine([boxed(7)], TOKENIZER)
    first_end = next(trajectory.turn_spans())[1]
    for length in (first_end, len(trajectory.completion_ids), -1):
        with pytest.raises(ValueError, match="samples no token after"):
            complete_prefixes([Prefix(trajectory, length)], ROWS, engine, [Notebook()], CONFIG, 1)
    last = Prefix(trajectory, starts(trajectory)[2])
    with pytest.raises(ValueError, match="leave no room"):
        complete_prefixes([last], ROWS, engine, [Notebook()], replace(CONFIG, max_trajectory_tokens=50), 1)
    with pytest.raises(ValueError, match="2 answered turns"):
        complete_prefixes([last], ROWS, engine, [Notebook()], replace(CONFIG, max_tool_calling_iterations=1), 1)
    with pytest.raises(ValueError, match="'firm'"):
        estimate_step_rewards([trajectory], ROWS, engine, [Notebook()], CONFIG, estimate="firm")
    assert complete_prefixes([], ROWS, engine) == []


def test_plain_functions_are_not_called_again():
    calls = []

    def python(code: str) -> str:
        """
        Counts.

        Args:
            code: Anything.
        """
        calls.append(code)
        return f"call {len(calls)}"

    engine = ScriptedEngine([code("a"), boxed(0)], TOKENIZER)
    (trajectory,) = generate_trajectories(ROWS, engine, [python], CONFIG, **QUIET)
    engine = ScriptedEngine([boxed(7)], TOKENIZER)
    ((completion,),) = complete_prefixes(
        [Prefix(trajectory, starts(trajectory)[1])], ROWS, engine, [python], CONFIG, 1, **QUIET
    )
    assert len(calls) == 1 and completion.completion[1] == trajectory.completion[1]


class Stairs:
    """An environment: whoever is on step 2 has won."""

    def reset(self, **row):
        self.step, self.done = 0, False

    def act(self, command: str) -> str:
        """
        Acts.

        Args:
            command: What to do.
        """
        self.step += {"up": 1, "down": -1}.get(command, 0)
        self.done = self.step == 2
        return f"You are on step {self.step}."

    def get_reward(self):
        return float(self.step == 2)


def test_an_environment_is_played_again_up_to_the_prefix():
    config = RolloutConfig(dialect="action", num_generations=1, max_tool_calling_iterations=4)
    options = {"environment_factory": Stairs, "progress": False}
    engine = ScriptedEngine(["Action: up", "Action: down", "Action: down"] + ["Action: wait"] * 2, TOKENIZER)
    (failed,) = generate_trajectories(ROWS, engine, None, config, **options)
    assert failed.reward == 0.0
    up = ScriptedEngine(lambda *_: "Action: up", TOKENIZER)
    (labelled,) = estimate_step_rewards([failed], ROWS, up, None, config, num_completions=1, **options)
    # of four actions two are left after `up, down`, which is enough; after the second `down` the one left is not
    assert labelled.info["step_rewards"]["values"] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_journal_keeps_completions(tmp_path):
    (trajectory,) = recorded()
    arguments = ([Notebook()], CONFIG)
    prefixes = [Prefix(trajectory, starts(trajectory)[1])]
    first = complete_prefixes(prefixes, ROWS, policy(FROM), *arguments, 3, journal=tmp_path, **QUIET)
    silent = ScriptedEngine([], TOKENIZER)
    silent_again = complete_prefixes(prefixes, ROWS, silent, *arguments, 3, journal=tmp_path, **QUIET)
    assert silent_again == first and not silent.calls
