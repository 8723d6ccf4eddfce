"""Search with a known score and a scripted policy: every number below is worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.rollout.notebook import TOKENIZER, Notebook, boxed, code, policy
from tests.support import render_actions, tiny_model, user
from trl_multiturn.evaluation import evaluate_policy
from trl_multiturn.models.value_model import ValueModel
from trl_multiturn.rollout import (
    RolloutConfig,
    ScriptedEngine,
    TransformersEngine,
    generate_trajectories,
)
from trl_multiturn.rollout.guided import settings as settings_module
from trl_multiturn.rollout.search import value_guided_search
from trl_multiturn.tools import PythonTool
from trl_multiturn.trajectory import StopReason, Verdict
from trl_multiturn.verify import math_reward


CONFIG = RolloutConfig(dialect="fenced", num_generations=1)
ROWS = [{"prompt": [user("Question?")], "answer": "2"}]


class Table:
    """Scores a state by the entry that occurs last in its text; remembers the texts."""

    def __init__(self, values):
        self.values, self.seen = values, []

    def __call__(self, states):
        texts = [TOKENIZER.decode(ids).partition("Question?")[2] for ids in states]
        self.seen += texts
        return [self.values[max(self.values, key=text.rfind)] for text in texts]


def search(tree, score, notebook=None, config=CONFIG, rows=ROWS, engine=None, **kwargs):
    engine = engine or policy(tree)
    tools = [notebook or Notebook()]
    return value_guided_search(rows, engine, tools, score, config=config, progress=False, **kwargs), engine


def answer(trajectory):
    return trajectory.completion[-1]["content"]


# Two first moves; the one that looks better leads to worse answers
TRAP = {
    "": [code("print('left')"), code("print('right')")],
    "output\nleft": [boxed(1), boxed(3)],
    "output\nright": [boxed(2), boxed(4)],
}
TRAP_SCORES = {
    "output\nleft": 0.7, "output\nright": 0.6,
    boxed(1): 0.2, boxed(3): 0.1, boxed(2): 0.9, boxed(4): 0.3,
}  # fmt: skip


def test_the_beam_finds_the_answer_that_greedy_choices_miss():
    (plain,) = generate_trajectories(ROWS, policy(TRAP), [Notebook()], CONFIG, progress=False)
    (narrow,), _ = search(TRAP, Table(TRAP_SCORES), beam=1, candidates=2)
    (wide,), _ = search(TRAP, Table(TRAP_SCORES), beam=2)
    # plain: the first of each; narrow: left (0.7 > 0.6), then 1 (0.2 > 0.1); wide: both kept, then 2 (0.9)
    assert [answer(t) for t in (plain, narrow, wide)] == [boxed(1), boxed(1), boxed(2)]
    told = wide.info["search"]
    assert (told["score"], told["drawn"], told["duplicates"]) == (0.9, 6, 0)  # 2 from the prompt, 2 from each of 2
    assert wide.info["decoding"]["beam"] == 2 and wide.stop_reason is StopReason.ANSWERED


def test_states_are_read_after_the_observation_and_before_the_end_of_an_answer():
    score = Table(TRAP_SCORES)
    search(TRAP, score, beam=2)
    left, right, *answers = score.seen
    assert left.endswith("```output\nleft\n```<|im_end|>\n<|im_start|>assistant\n")
    assert right.endswith("```output\nright\n```<|im_end|>\n<|im_start|>assistant\n")
    assert [text.rpartition("assistant\n")[2] for text in answers] == [boxed(1), boxed(3), boxed(2), boxed(4)]


def test_a_reward_model_reads_actions():
    score = Table({"'left'": 0.7, "'right'": 0.6, boxed(1): 0.2, boxed(3): 0.1, boxed(2): 0.9, boxed(4): 0.3})
    (found,), _ = search(TRAP, score, beam=2, score_at="action")
    turns = [code("print('left')"), code("print('right')"), *map(boxed, (1, 3, 2, 4))]
    assert [text.rpartition("assistant\n")[2] for text in score.seen] == [turn + "<|im_end|>" for turn in turns]
    assert answer(found) == boxed(2)


def test_what_was_sampled_is_what_is_kept():
    (found,), engine = search(TRAP, Table(TRAP_SCORES), beam=2)
    assert render_actions(TOKENIZER, found.to_dict()) == [
        code("print('right')") + "<|im_end|>",
        boxed(2) + "<|im_end|>",
    ]
    assert found.logps == [-0.5 * bit for bit in found.action_mask]
    ids = found.prompt_ids + found.completion_ids
    sampled_after = {tuple(call.prompt_ids + call.generation.token_ids) for call in engine.calls}
    for _, stop in found.turn_spans():
        assert tuple(ids[: len(found.prompt_ids) + stop]) in sampled_after
    assert [message["role"] for message in found.completion] == ["assistant", "user", "assistant"]


def by_seed(turns):
    """A policy whose every turn is drawn by the turn's seed."""

    def script(prompt_text, sampling, session):
        options = turns if prompt_text.count("```output") < 3 else [boxed(0)]
        return options[sampling.seed % len(options)]

    return ScriptedEngine(script, TOKENIZER, logp=-0.5)


def test_one_candidate_is_plain_sampling():
    turns = [code("x = 1"), code("print(5)"), code("print(x)"), boxed(2), boxed(3)]
    rows = ROWS * 8
    config = replace(CONFIG, num_generations=2)
    plain = generate_trajectories(rows, by_seed(turns), [Notebook()], config, progress=False)
    searched, _ = search(
        None, lambda states: [0.0] * len(states), engine=by_seed(turns), rows=rows, beam=1, num_generations=2
    )
    assert len({tuple(t.completion_ids) for t in plain}) > 4
    for a, b in zip(plain, searched, strict=True):
        for name in ("prompt_ids", "completion", "completion_ids", "action_mask", "logps", "stop_reason"):
            assert getattr(a, name) == getattr(b, name)
        assert (a.info["seed"], a.info["tool_statuses"]) == (b.info["seed"], b.info["tool_statuses"])


def test_one_candidate_is_plain_sampling_from_a_model():
    engine = TransformersEngine(tiny_model(TOKENIZER), TOKENIZER)
    config = replace(CONFIG, max_turn_tokens=12)
    (plain,) = generate_trajectories(ROWS, engine, [Notebook()], config, progress=False)
    (searched,), _ = search(None, lambda states: [0.0] * len(states), engine=engine, config=config, beam=1)
    assert searched.completion_ids == plain.completion_ids and searched.logps == plain.logps


STATE = {
    "": [code("x = [1]\nprint('one')"), code("x = [2]\nprint('two')")],
    "output\none": [code("x.append(10); print('sum', sum(x))"), code("x.append(20); print('sum', sum(x))")],
    "output\ntwo": [code("x.append(30); print('sum', sum(x))"), code("x.append(40); print('sum', sum(x))")],
    "output\nsum": [code("x.append(100); print('then', sum(x))"), code("x.append(200); print('then', sum(x))")],
    "output\nthen": [boxed("end"), boxed("end")],
}


def largest(states):
    """The last number in the state."""
    scores = []
    for ids in states:
        digits = "".join(c if c.isdigit() else " " for c in TOKENIZER.decode(ids).partition("Question?")[2]).split()
        scores.append(float(digits[-1]) if digits else 0.0)
    return scores


@pytest.mark.parametrize("tool", [Notebook, PythonTool])
def test_every_candidate_has_an_interpreter_of_its_own(tool):
    notebook = tool()
    (found,), _ = search(STATE, largest, notebook, beam=2)
    outputs = [m["content"].split("\n")[1] for m in found.completion if m["role"] == "user"]
    # had siblings shared a list, 30 and 40 (or 100 and 200) would both be in it
    assert outputs == ["two", "sum 42", "then 242"]
    assert "replays_differ" not in found.info and found.info["tool_calls"] == 3
    if tool is PythonTool:
        assert not notebook.sandbox._sessions
        notebook.close()


def test_dropped_candidates_hold_nothing():
    notebook = Notebook()
    searched, engine = search(STATE, largest, notebook, beam=2)
    assert notebook.open_now == 0
    assert notebook.most_open <= 4  # beam · candidates, though 2 + 4 + 4 candidates called tools
    used = {call.session for call in engine.calls}
    assert set(engine.released) >= used and len(engine.released) == len(set(engine.released))
    assert searched[0].info["trajectory_id"] in used


def test_a_tool_whose_answers_vary_is_reported():
    class Dice(Notebook):
        def open(self):
            session = super().open()
            session.names["roll"] = lambda: self.opened  # another number in every session
            return session

    tree = {"": [code("print('rolled', roll())")], "output\nrolled": [code("print('go')"), code("print('on')")]}
    tree["output\ngo"] = tree["output\non"] = [boxed(1)]
    scores = {"output\nrolled": 0.5, "output\ngo": 0.1, "output\non": 0.9, boxed(1): 1.0}
    (found,), _ = search(tree, Table(scores), Dice(), beam=2)
    assert found.completion[3]["content"].startswith("```output\non")  # the second child: its session was replayed
    assert found.info["replays_differ"] == 1


def test_finished_candidates_compete_in_the_ranking_or_wait_in_the_pool():
    tree = {
        "": [boxed(5), code("print('a')"), code("print('b')")],
        "output\na": [boxed(3)],
        "output\nb": [boxed(2)],
    }
    scores = Table({boxed(5): 0.5, "output\na": 0.7, "output\nb": 0.6, boxed(3): 0.3, boxed(2): 0.2})
    (ranked,), _ = search(tree, scores, beam=2, candidates=3, finished="rank")
    (pooled,), _ = search(tree, scores, beam=2, candidates=3, finished="pool")
    # rank: 0.7 and 0.6 push 0.5 out of the beam, and then end at 0.3 and 0.2; the pool still has 0.5
    assert (answer(ranked), answer(pooled)) == (boxed(3), boxed(5))
    # each parent's three children are one and the same
    told = ranked.info["search"]
    assert (told["score"], told["drawn"], told["duplicates"]) == (0.3, 9, 4)


def test_a_finished_candidate_keeps_its_place_in_the_ranking():
    tree = {"": [boxed(5), code("print('a')")], "output\na": [boxed(3)]}
    (found,), _ = search(tree, Table({boxed(5): 0.8, "output\na": 0.1, boxed(3): 0.9}), beam=1, candidates=2)
    assert answer(found) == boxed(5)  # the beam of one is full: the search ends
    (found,), _ = search(tree, Table({boxed(5): 0.8, "output\na": 0.1, boxed(3): 0.9}), beam=2)
    assert answer(found) == boxed(3)


def test_equal_candidates_count_once_and_run_their_tools_once():
    notebook = Notebook()
    tree = {"": [code("print('a')")] * 2 + [code("print('b')")], "output\na": [boxed(1)], "output\nb": [boxed(2)]}
    scores = Table({"output\na": 0.9, "output\nb": 0.1, boxed(1): 0.2, boxed(2): 0.8})
    (found,), _ = search(tree, scores, notebook, beam=2, candidates=3)
    assert answer(found) == boxed(2)  # two copies of `a` would have filled the beam
    assert notebook.opened == 2 and found.info["search"]["duplicates"] == 1 + 2 * 2


def test_dead_ends_do_not_compete():
    tree = {"": ["I give up.", code("print('a')")], "output\na": [boxed(1)]}
    scores = {"give up": 0.9, "output\na": 0.1, boxed(1): 0.1}
    (found,), _ = search(tree, Table(scores), beam=1, candidates=2)
    assert answer(found) == boxed(1)
    (found,), _ = search({"": ["I give up.", "Oh no."]}, Table({"give up": 0.1, "Oh no": 0.2}), beam=2)
    assert (found.stop_reason, answer(found)) == (StopReason.ENDED, "Oh no.")


def test_a_failure_of_the_machine_is_no_evidence():
    tree = {"": [code("fail()"), code("print('a')")], "output\na": ["I give up."]}
    (found,), _ = search(
        tree, Table({"output\na": 0.5, "give up": 0.5}), beam=2, reward_funcs=math_reward,
        config=replace(CONFIG, tool_retries=0),
    )  # fmt: skip
    assert found.stop_reason is StopReason.TOOL_FAILED and found.verdict is Verdict.UNDECIDED
    assert "the machine is gone" in found.info["tool_failure"]
    tree["output\na"] = [boxed(2)]
    (found,), _ = search(
        tree, Table({"output\na": 0.5, boxed(2): 0.5}), beam=2, reward_funcs=math_reward,
        config=replace(CONFIG, tool_retries=0),
    )  # fmt: skip
    assert found.verdict is Verdict.CORRECT


# Steps inside a turn

LINES = {
    "": ["One\nxxx", "Two\nxxx"],  # a step ends at its line break: what the script says after it is never sampled
    "One\n\n": [" so\nxxx"],
    "One\n": ["\nxxx", "thus\nxxx"],
    "Two\n": ["hence\nxxx", "ergo\nxxx"],
    "so\n": [boxed(1)],
    "ergo\n": ["```python\n"],
    "```python\n": ["print('y')\nxxx"],
    "print('y')\n": ["```"],
    "output\ny": [boxed(2)],
}


def test_lines_are_steps_and_turns_stay_whole():
    scores = Table(
        {"One\n": 0.4, "Two\n": 0.6, "so\n": 0.7, "thus\n": 0.1, "hence\n": 0.2, "ergo\n": 0.3, boxed(1): 0.1,
         "```python\n": 0.5, "print('y')\n": 0.5, "output\ny": 0.5, boxed(2): 0.9}
    )  # fmt: skip
    (found,), engine = search(LINES, scores, beam=2, step="line")
    # One (0.4) and Two (0.6) stay; then so (0.7) and ergo (0.3); so answers (0.1), ergo calls the tool and gets to 0.9
    turn = "Two\nergo\n" + code("print('y')")
    assert [m["content"] for m in found.completion] == [turn, "```output\ny\n```", boxed(2)]
    assert render_actions(TOKENIZER, found.to_dict())[0] == turn + "<|im_end|>"
    assert found.logps == [-0.5 * bit for bit in found.action_mask]
    assert all("\n" in call.sampling.stop_strings for call in engine.calls)
    states = [text.rpartition("assistant\n")[2] for text in scores.seen]
    assert "One\n\n so\n" in states and "One\n\n" not in states  # a blank line is no step


def test_a_turn_that_runs_out_of_tokens_in_the_middle_of_a_line_is_cut():
    config = replace(CONFIG, max_turn_tokens=8)
    engine = ScriptedEngine(lambda *_: "abc\n", TOKENIZER, end_turns=False)
    (found,), _ = search(None, lambda s: [0.0] * len(s), engine=engine, config=config, beam=1, step="line")
    assert (found.stop_reason, answer(found)) == (StopReason.MAX_TOKENS, "abc\nabc\n")


def test_a_real_policy_and_a_real_value_model(monkeypatch):
    # a random model seldom breaks a line: here steps end at lower-case letters
    monkeypatch.setitem(settings_module.STEP_STOPS, "line", tuple("abcdefghijklmnopqrstuvwxyz"))
    model = tiny_model(TOKENIZER)
    value_model = ValueModel.from_policy(model, "full")
    torch.nn.init.normal_(value_model.head.weight)
    engine = TransformersEngine(model, TOKENIZER)
    (found,), _ = search(
        None, value_model.score, engine=engine, beam=2, step="line", config=replace(CONFIG, max_turn_tokens=30)
    )
    assert found.info["search"]["drawn"] > 6 and len(found.completion_ids) == 30
    # branches, shared caches and joined pieces: the log-probabilities are those of one pass over the ids
    ids = torch.tensor([found.prompt_ids + found.completion_ids])
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
    assert found.logps == pytest.approx(logps[len(found.prompt_ids) - 1 :].tolist(), abs=1e-4)
    state = found.prompt_ids + found.completion_ids
    assert found.info["search"]["score"] == pytest.approx(value_model.score([state])[0], abs=1e-4)


def test_candidates_share_what_was_read_of_their_prefix(monkeypatch):
    class WithoutFork(TransformersEngine):
        fork = None

    monkeypatch.setitem(settings_module.STEP_STOPS, "line", tuple("abcdefghijklmnopqrstuvwxyz"))
    config = replace(CONFIG, max_turn_tokens=30)
    found, read = {}, {}
    for kind in (TransformersEngine, WithoutFork):
        engine = kind(tiny_model(TOKENIZER), TOKENIZER)
        (found[kind],), _ = search(
            None, lambda states: [-sum(s) for s in states], engine=engine, beam=2, candidates=3, step="line",
            config=config,
        )  # fmt: skip
        read[kind] = engine.stats["prefilled_tokens"]
        assert engine.stats["retained_caches"] == 0
    assert found[TransformersEngine].completion_ids == found[WithoutFork].completion_ids
    # one pass over the prompt (two where the first candidate was taken before the others came), then what was sampled
    # last of each kept state; without forks every step reads the whole state again
    assert read[TransformersEngine] < 0.5 * read[WithoutFork]


# Environments


class Corridor:
    """Three doors; only the second of the first room leads on."""

    played: list[str] = []

    def reset(self, **row):
        self.room, self.done = 0, False
        return " You are in room 0."

    def act(self, command: str) -> str:
        """
        Acts.

        Args:
            command: What to do.
        """
        self.played.append(command)
        self.room += command == "east"
        self.done = self.room == 2
        return f"You are in room {self.room}."

    def get_reward(self):
        return float(self.room == 2)


def test_best_of_k_actions_where_nothing_can_be_taken_back():
    Corridor.played = []
    actions = iter(["Action: north", "Action: east", "Action: west", "Action: east", "Action: south", "Action: east"])
    seen = []

    def score(states):
        texts = [TOKENIZER.decode(ids) for ids in states]
        seen.extend(texts)
        return [float(text.endswith("east")) for text in texts]

    engine = ScriptedEngine(lambda *_: next(actions), TOKENIZER)
    config = RolloutConfig(dialect="action", max_tool_calling_iterations=5)
    (found,) = value_guided_search(
        ROWS, engine, None, score, beam=1, candidates=3, config=config, environment_factory=Corridor, progress=False
    )
    assert Corridor.played == ["east", "east"]  # one action of each three was played
    assert found.stop_reason is StopReason.ANSWERED and found.reward == 1.0
    assert seen[0].endswith("Action: north") and "room 1" in seen[3]
    assert found.prompt[-1]["content"] == "Question? You are in room 0."
    with pytest.raises(ValueError, match="cannot be taken back"):
        value_guided_search(ROWS, engine, None, score, beam=2, config=config, environment_factory=Corridor)


# Around it


def test_it_is_evaluated_like_a_policy():
    rows = [{"prompt": [user("Question?")], "answer": a} for a in ("2", "2", "1", "2")]
    decode = partial(value_guided_search, score=Table(TRAP_SCORES), beam=2)
    result = evaluate_policy(
        rows, policy(TRAP), [Notebook()], math_reward, config=CONFIG, search=decode, progress=False
    )
    assert result.pass_at_1 == 0.75 and result.greedy.standard_error == pytest.approx(0.25)
    assert [t.verdict for t in result.trajectories].count(Verdict.CORRECT) == 3


def test_states_of_many_prompts_are_scored_together_one_call_at_a_time():
    sizes, busy = [], []

    def score(states):
        assert not busy
        busy.append(1)
        sizes.append(len(states))
        busy.pop()
        return [0.0] * len(states)

    search(TRAP, score, rows=ROWS * 6, beam=2)
    assert sum(sizes) == 6 * (2 + 4) and len(sizes) < 12


@pytest.mark.parametrize(
    ("scores", "message"),
    [(lambda s: [0.0], "1 numbers for 2 states"), (lambda s: [float("nan")] * len(s), "nan, which ranks nothing")],
)
def test_scores_that_rank_nothing_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        search(TRAP, scores, beam=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beam": 0}, "at least 1"),
        ({"step": "word"}, "step='word'"),
        ({"finished": "never"}, "finished='never'"),
        ({"score_at": "noon"}, "score_at='noon'"),
        ({"config": replace(CONFIG, temperature=0.0)}, "nothing to choose"),
    ],
)
def test_arguments_that_allow_no_search_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        search(TRAP, Table(TRAP_SCORES), **kwargs)
    with pytest.raises(TypeError, match="cannot be called"):
        search(TRAP, object())
