"""The rollout loop, played by a scripted engine: order, concurrency, masks, budgets, failures, verdicts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial

import pytest

from tests.support import assistant, byte_tokenizer, render_actions, user
from trl_multiturn import StopReason, Verdict
from trl_multiturn.errors import TooManyRewardErrors
from trl_multiturn.rollout import (
    Journal,
    RolloutConfig,
    ScriptedEngine,
    TooManyToolFailures,
    agenerate_trajectories,
    generate_trajectories,
    read_dataset,
)
from trl_multiturn.rollout.provenance import fingerprint, version_of
from trl_multiturn.templates import TurnTemplate
from trl_multiturn.tools import PythonTool, SandboxConfig, ToolFailure, ToolResult, current_rollout


TOKENIZER = byte_tokenizer("qwen2_5")
CODE = "Compute.\n```python\nprint(1)\n```"
ANSWER = "It is \\boxed{1}."


class Echo:
    """A session tool for the fenced dialect: answers with the number of its calls and what `reply` says."""

    name = "python"
    version = "echo-1"
    schema = {
        "type": "function",
        "function": {
            "name": "python",
            "description": "Echo.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "Code."}},
                "required": ["code"],
            },
        },
    }

    def __init__(self, reply=lambda number: f"out {number}"):
        self.reply = reply

    def open(self):
        return EchoSession(self.reply)


class EchoSession:
    def __init__(self, reply):
        self.reply, self.number = reply, 0

    async def arun(self, code):
        self.number += 1
        reply = self.reply(self.number)
        return ToolResult(await reply if asyncio.iscoroutine(reply) else reply)

    def run(self, code):
        raise AssertionError("arun is preferred")

    def close(self):
        pass


def add(a: int, b: int) -> int:
    """
    Adds.

    Args:
        a: First.
        b: Second.
    """
    return a + b


def rows(count=1, **columns):
    return [{"prompt": [user(f"Question {i}?")], "answer": str(i), **columns} for i in range(count)]


def roll(script, tools=None, prompts=None, tokenizer=TOKENIZER, dialect="fenced", **settings):
    names = {name: settings.pop(name) for name in list(settings) if name not in RolloutConfig.__dataclass_fields__}
    settings = {"num_generations": 1, **settings}
    engine = ScriptedEngine(script, tokenizer, logp=-0.25)
    tools = [Echo()] if tools is None else tools
    config = RolloutConfig(dialect=dialect, **settings)
    return generate_trajectories(prompts or rows(), engine, tools, config, progress=False, **names), engine


@pytest.mark.parametrize(
    "prompt",
    [
        [{"from": "human", "value": "Question 0?"}],
        [{"role": "user", "content": [{"type": "text", "text": "Question 0?"}], "tool_calls": None}],
    ],
)
def test_prompts_as_other_tools_write_them_come_into_the_form(prompt):
    (trajectory,), _ = roll([ANSWER], prompts=[{"prompt": prompt, "answer": "0"}])
    assert trajectory.prompt == [user("Question 0?")]


def test_trajectories_say_which_turns_answer():
    (trajectory,), _ = roll([CODE, ANSWER])
    assert trajectory.turn_calls == [1, 0]
    (trajectory,), _ = roll([CODE, CODE], max_tool_calling_iterations=1)
    assert trajectory.turn_calls == [1, 1]


def tool_call(**arguments):
    text = ", ".join(f'"{name}": {value}' for name, value in arguments.items())
    return f'<tool_call>\n{{"name": "add", "arguments": {{{text}}}}}\n</tool_call>'


# What a trajectory holds


def test_a_trajectory_is_what_was_sampled_and_what_was_read():
    (trajectory,), engine = roll([CODE, CODE, ANSWER])
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert trajectory.completion == [
        assistant(CODE), user("```output\nout 1\n```"),
        assistant(CODE), user("```output\nout 2\n```"),
        assistant(ANSWER),
    ]  # fmt: skip
    assert render_actions(TOKENIZER, trajectory.to_dict()) == [text + "<|im_end|>" for text in (CODE, CODE, ANSWER)]
    assert trajectory.logps == [-0.25 * bit for bit in trajectory.action_mask]
    # ids sampled = ids trained: each turn was sampled after exactly the ids that stand before it
    ids = trajectory.prompt_ids + trajectory.completion_ids
    spans = [
        (len(trajectory.prompt_ids) + start, len(trajectory.prompt_ids) + stop)
        for start, stop in trajectory.turn_spans()
    ]
    assert [(ids[:start], ids[start:stop]) for start, stop in spans] == [
        (call.prompt_ids, call.generation.token_ids) for call in engine.calls
    ]
    assert engine.released == ["0/current/0/0"]
    assert trajectory.info["tool_calls"] == 2 and trajectory.info["tool_errors"] == 0


@pytest.mark.parametrize(
    ("family", "dialect", "script"),
    [
        ("qwen2_5", "fenced", [CODE, CODE, ANSWER]),
        ("gemma", "fenced", [CODE, ANSWER]),
        ("llama3", "fenced", [CODE, CODE, ANSWER]),
        ("qwen2_5", "native", [tool_call(a=1, b=2), tool_call(a=3, b=4), "It is 7."]),
        ("qwen3_instruct_2507", "native", [tool_call(a=1, b=2), "It is 3."]),
        ("llama3_1", "native", ['{"name": "add", "parameters": {"a": 1, "b": 2}}', "It is 3."]),
    ],
)
def test_the_mask_equals_that_of_the_same_messages_tokenised_as_text(family, dialect, script):
    tokenizer = byte_tokenizer(family)
    tools = [add] if dialect == "native" else [Echo()]
    (trajectory,), _ = roll(script, tools, tokenizer=tokenizer, dialect=dialect)
    assert trajectory.stop_reason is StopReason.ANSWERED
    schemas = trajectory.info["dialect"] == "native" and [add]
    row = TurnTemplate(tokenizer, tools=schemas or None).tokenize(trajectory.prompt, trajectory.completion)
    length = len(trajectory.completion_ids)  # the rendering may go on after the last end-of-turn token
    assert row["prompt_ids"] == trajectory.prompt_ids
    assert row["completion_ids"][:length] == trajectory.completion_ids
    assert row["action_mask"] == trajectory.action_mask + [0] * (len(row["completion_ids"]) - length)


def test_a_turn_cut_by_a_stop_string_is_closed_but_the_closing_is_not_trained():
    (trajectory,), engine = roll([CODE + "\n```output\n1\n```", ANSWER])
    assert render_actions(TOKENIZER, trajectory.to_dict()) == [CODE + "\n```output", ANSWER + "<|im_end|>"]
    assert engine.calls[1].prompt_text.endswith(
        "```output<|im_end|>\n<|im_start|>user\n```output\nout 1\n```<|im_end|>\n<|im_start|>assistant\n"
    )


def test_native_calls_of_a_turn_are_answered_in_order():
    script = [tool_call(a=1, b=1) + "\n" + tool_call(a=2, b=2) + "\n" + tool_call(a=2), "Done."]
    (trajectory,), _ = roll(script, [add], dialect="native")
    outputs = ["2", "4", "{'error': 'Missing argument(s): b.'}"]
    assert trajectory.completion[1:4] == [{"role": "tool", "name": "add", "content": text} for text in outputs]
    assert trajectory.info["tool_statuses"] == ["ok", "ok", "error"] and trajectory.info["tool_errors"] == 1


def strict_tokenizer(obstacle):
    """A tokenizer whose template refuses messages `m` for which `obstacle` (Jinja) is true."""
    tokenizer = byte_tokenizer("qwen2_5")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if " + obstacle + " %}{{ raise_exception('refused') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def test_two_calls_where_the_template_prints_one_are_answered_by_a_hint():
    tokenizer = strict_tokenizer("m.tool_calls and m.tool_calls | length > 1")  # such are Llama 3's
    script = [tool_call(a=1, b=1) + "\n" + tool_call(a=2, b=2), tool_call(a=2, b=2), "Done."]
    (trajectory,), _ = roll(script, [add], dialect="native", tokenizer=tokenizer)
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert trajectory.info["malformed_calls"] == 1 and trajectory.info["tool_calls"] == 1
    hint = "{'error': 'Only one tool call per turn is possible, so none was run. Call one tool at a time.'}"
    assert trajectory.completion[1] == user(hint)


def test_observations_that_the_template_refuses_end_the_trajectory_not_the_run():
    tokenizer = strict_tokenizer("m.role == 'tool' and m.content == '666'")
    trajectories, _ = roll(
        lambda text, sampling, session: "Done." if "<|im_start|>tool" in text else tool_call(a=665, b=session[-3]),
        [add], rows(2), dialect="native", tokenizer=tokenizer,
    )  # fmt: skip
    assert [t.stop_reason for t in trajectories] == [StopReason.ANSWERED, StopReason.ENDED]
    assert "refused" in trajectories[1].info["unrenderable"] and trajectories[1].action_mask[-1] == 1


def test_the_interpreter_is_real():
    with PythonTool(SandboxConfig(isolation="best_effort")) as tool:
        script = ["```python\nx = 6\n```", "```python\nx * 7\n```", "```python\ny\n```", "\\boxed{42}"]
        trajectories, _ = roll(script, [tool], rows(2), num_generations=2)
    for trajectory in trajectories:
        outputs = [message["content"] for message in trajectory.completion if message["role"] == "user"]
        assert outputs[1:] == ["```output\n42\n```", "```output\nNameError: name 'y' is not defined\n```"]
        assert trajectory.info["tool_statuses"] == ["ok", "ok", "error"]


def test_every_turn_and_every_call_has_its_time():
    """Two calls in the first turn, none in the second, which could not be read, one in the third."""
    script = [tool_call(a=1, b=1) + "\n" + tool_call(a=2, b=2), "<tool_call>", tool_call(a=3, b=3), "Done."]
    (trajectory,), _ = roll(script, [add], dialect="native")
    timing = trajectory.info["timing"]
    assert trajectory.info["tool_turns"] == [0, 0, 2]
    assert len(timing["call_seconds"]) == 3 and sum(timing["call_seconds"]) == timing["tool_seconds"]
    assert len(timing["sampling_seconds"]) == trajectory.num_turns == 4
    assert sum(timing["sampling_seconds"]) + timing["tool_seconds"] <= timing["seconds"]


# Order and concurrency


def test_trajectories_come_by_prompt_then_by_sample_whatever_finishes_first():
    async def slow_first(number):
        context = current_rollout()
        for _ in range(20 - 5 * context.prompt_index - context.sample_index):
            await asyncio.sleep(0)
        return "x"

    finished = []
    trajectories, _ = roll(
        [CODE, ANSWER], [Echo(slow_first)], rows(3), num_generations=2, on_trajectory=lambda t: finished.append(t)
    )
    places = [(t.info["prompt_index"], t.info["sample_index"]) for t in trajectories]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [t.prompt for t in trajectories[::2]] == [row["prompt"] for row in rows(3)]
    assert sorted(map(id, finished)) == sorted(map(id, trajectories)) and finished[0] is not trajectories[0]


def test_no_trajectory_waits_for_anothers_tools():
    done = asyncio.Event()

    async def reply(number):
        if current_rollout().prompt_index == 0:
            await done.wait()  # a lock-step loop would wait here for ever: the others' later turns set it
        elif number == 3:
            done.set()
        return "x"

    def script(prompt_text, sampling, session):
        return ANSWER if prompt_text.count("```output") == (1 if session == "0/current/0/0" else 3) else CODE

    trajectories, engine = roll(script, [Echo(reply)], rows(2))
    assert [t.info["tool_calls"] for t in trajectories] == [1, 3]
    assert engine.calls[-1].session == "0/current/0/0"


def test_64_sleeping_trajectories_sleep_together():
    sleeping, together = 0, asyncio.Event()

    async def sleep(number):
        nonlocal sleeping
        sleeping += 1
        if sleeping == 64:
            together.set()
        await asyncio.wait_for(together.wait(), 60)  # the first would wake in vain if it were waited for
        await asyncio.sleep(0.01)
        sleeping -= 1
        return "x"

    def script(prompt_text, sampling, session):
        turns = int(session.split("/")[2]) % 6 + 1
        return ANSWER if prompt_text.count("```output") == turns else CODE

    trajectories, _ = roll(script, [Echo(sleep)], rows(64))
    assert [t.info["tool_calls"] for t in trajectories] == [i % 6 + 1 for i in range(64)]
    assert [t.info["tool_statuses"].count("ok") for t in trajectories] == [i % 6 + 1 for i in range(64)]


@pytest.mark.parametrize(("limit", "value"), [("max_concurrent_trajectories", 3), ("max_concurrent_tools", 2)])
def test_concurrency_limits_hold(limit, value):
    running, most, full = 0, 0, asyncio.Event()

    async def reply(number):
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == value:
            full.set()
        await asyncio.wait_for(full.wait(), 60)
        await asyncio.sleep(0.01)  # whoever comes beyond the limit comes now
        running -= 1
        return "x"

    roll([CODE, ANSWER], [Echo(reply)], rows(12), **{limit: value})
    assert most == value


def test_every_turn_has_its_own_seed_that_depends_on_its_place_alone():
    def seeds(**kwargs):
        _, engine = roll([CODE, ANSWER], prompts=rows(2), num_generations=2, **kwargs)
        return {(call.session, len(call.prompt_ids)): call.sampling.seed for call in engine.calls}

    base = seeds()
    assert len(set(base.values())) == 8
    assert seeds(max_concurrent_trajectories=1) == base
    for change in ({"seed": 1}, {"iteration": 1}, {"policy": "previous"}, {"sample_offset": 2}):
        assert not set(seeds(**change).values()) & set(base.values())
    share = seeds(prompt_indices=[1, 5])  # another process's share: row 0 here is row 1 of the whole
    assert {seed for (name, _), seed in share.items() if "/1/" in name} == {
        seed for (name, _), seed in base.items() if name.startswith("0/current/1/")
    }


def test_the_samples_of_a_prompt_take_the_temperatures_in_turn():
    _, engine = roll([CODE, ANSWER], num_generations=3, temperature=1.0, temperature_variants=[0.7])
    temperatures = {(call.session, call.sampling.temperature) for call in engine.calls}
    assert temperatures == {("0/current/0/0", 1.0), ("0/current/0/1", 0.7), ("0/current/0/2", 1.0)}


def test_it_runs_inside_a_running_loop_too():
    async def notebook():
        return roll([CODE, ANSWER], prompts=rows(2))[0]

    async def native():
        engine = ScriptedEngine([CODE, ANSWER], TOKENIZER)
        config = RolloutConfig(num_generations=1, dialect="fenced")
        return await agenerate_trajectories(rows(2), engine, [Echo()], config, progress=False)

    plain = [t.completion_ids for t in roll([CODE, ANSWER], prompts=rows(2))[0]]
    assert [t.completion_ids for t in asyncio.run(notebook())] == plain
    assert [t.completion_ids for t in asyncio.run(native())] == plain


# Limits


def test_turns_beyond_the_limit_end_the_trajectory_unrun():
    (trajectory,), engine = roll([CODE] * 3, max_tool_calling_iterations=2)
    assert trajectory.stop_reason is StopReason.MAX_TURNS
    assert trajectory.num_turns == 3 and trajectory.info["tool_calls"] == 2


def test_a_turn_over_its_limit_is_cut_off_not_finished():
    (trajectory,), engine = roll(["x" * 40], max_turn_tokens=30)
    assert trajectory.stop_reason is StopReason.MAX_TOKENS
    assert trajectory.num_sampled_tokens == 30 and trajectory.completion == [assistant("x" * 30)]


@pytest.mark.parametrize("limit", range(160, 300, 7))
def test_prompt_and_completion_never_exceed_the_limit(limit):
    (trajectory,), engine = roll([CODE, CODE, ANSWER], max_trajectory_tokens=limit)
    length = len(trajectory.prompt_ids) + len(trajectory.completion_ids)
    assert length <= limit
    assert trajectory.stop_reason in (StopReason.MAX_TOKENS, StopReason.ANSWERED)
    assert trajectory.completion[-1]["role"] == "assistant" and trajectory.action_mask[-1] == 1
    assert all(len(call.prompt_ids) + call.sampling.max_new_tokens <= limit for call in engine.calls)


def test_an_observation_that_leaves_no_room_is_not_appended():
    (trajectory,), engine = roll([CODE], [Echo(lambda number: "y" * 500)], max_trajectory_tokens=400)
    assert trajectory.stop_reason is StopReason.MAX_TOKENS
    assert trajectory.completion == [assistant(CODE)] and set(trajectory.action_mask) == {1}


def test_neither_call_nor_answer_is_an_end():
    (trajectory,), _ = roll(["I give up."])
    assert trajectory.stop_reason is StopReason.ENDED


def test_a_malformed_call_is_answered_or_ends_as_configured():
    (trajectory,), _ = roll(["```python\nprint(1)", ANSWER])
    assert trajectory.stop_reason is StopReason.ANSWERED and trajectory.info["malformed_calls"] == 1
    assert "not closed" in trajectory.completion[1]["content"]
    (trajectory,), _ = roll(["```python\nprint(1)"], malformed_calls="end")
    assert trajectory.stop_reason is StopReason.ENDED and len(trajectory.completion) == 1


# Whatever a tool does is data


def odd(kind: str) -> str:
    """
    Misbehaves.

    Args:
        kind: How.
    """
    if kind == "exit":
        raise SystemExit(3)
    if kind == "surrogate":
        return ToolResult("a\ud800b", "error")
    if kind == "nothing":
        return None
    return "x" * 10**6


async def odd_async(kind: str) -> str:
    """
    Misbehaves.

    Args:
        kind: How.
    """
    return odd(kind)


@pytest.mark.parametrize("tool", [odd, odd_async], ids=["thread", "coroutine"])
@pytest.mark.parametrize(
    ("kind", "answer", "status"),
    [("exit", "{'error': 'SystemExit: 3'}", "error"), ("surrogate", "a?b", "error"), ("nothing", "None", "ok")],
)
def test_a_tool_that_misbehaves_ends_no_run(tool, kind, answer, status):
    call = f'<tool_call>\n{{"name": "{tool.__name__}", "arguments": {{"kind": "{kind}"}}}}\n</tool_call>'
    (trajectory,), _ = roll([call, "done"], [tool], dialect="native")
    assert trajectory.completion[1]["content"] == answer and trajectory.info["tool_statuses"] == [status]
    assert trajectory.stop_reason is StopReason.ANSWERED


async def waits(seconds: float) -> str:
    """
    Waits.

    Args:
        seconds: How long.
    """
    await asyncio.sleep(seconds)
    return f"waited {seconds:g}"


@pytest.mark.parametrize(
    ("own", "limit", "answer"),
    [(0.05, 300.0, "Timed out after 0.05 seconds."), (300.0, 0.05, "waited 0.2"), (None, 300.0, "waited 0.2")],
)
def test_a_tool_may_have_a_time_limit_of_its_own(monkeypatch, own, limit, answer):
    monkeypatch.setattr(waits, "timeout_seconds", own, raising=False)
    seconds = 300 if "Timed" in answer else 0.2
    call = f'<tool_call>\n{{"name": "waits", "arguments": {{"seconds": {seconds}}}}}\n</tool_call>'
    (trajectory,), _ = roll([call, "done"], [waits], dialect="native", tool_timeout_seconds=limit)
    assert trajectory.completion[1]["content"] == answer
    assert trajectory.info["tools"]["waits"].endswith(" s") == (own is not None)


@pytest.mark.parametrize(
    ("call", "answer", "malformed"),
    [
        ('{"name": "odd", "arguments": {"kind": ' + "[" * 3000 + "]" * 3000 + "}}", "could not be read", 1),
        ('{"name": "odd", "arguments": {"kind": ' + "[" * 100 + "]" * 100 + "}}", "could not be read", 1),
        ('{"name": "odd", "arguments": "' + "[" * 3000 + '"}', "not valid JSON: maximum recursion", 0),
        ('{"name": "odd", "arguments": {"kind": "", "n": ' + "9" * 5000 + "}}", "could not be read", 1),
        (r'{"name": "\ud800", "arguments": {"\udfff": "\ud800"}}', "Tool ? not found.", 0),
        (r'{"name": "odd", "arguments": {"\udfff": "\ud800", "kind": "exit"}}', "Unknown argument(s): ?", 0),
    ],
    ids=["nested", "nested, readable", "nested in text", "long number", "name in no encoding", "argument in none"],
)
def test_a_call_that_no_parser_follows_ends_no_run(tmp_path, call, answer, malformed):
    """What a policy writes when it degenerates is its own mistake."""
    turns = [f"<tool_call>\n{call}\n</tool_call>", "done"]
    limits = dict(max_turn_tokens=9000, max_trajectory_tokens=20_000)
    (trajectory,), _ = roll(turns, [odd], dialect="native", journal=tmp_path, **limits)
    assert answer in trajectory.completion[1]["content"] and trajectory.info["malformed_calls"] == malformed
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert read_dataset(Journal(tmp_path).write_dataset()) == [replace(trajectory, info=trajectory.provenance)]


def test_an_answer_of_megabytes_is_not_even_tokenized(monkeypatch):
    """A tokenizer takes seconds for it, in which no other trajectory would go on."""
    lengths = []
    call = '<tool_call>\n{"name": "odd", "arguments": {"kind": "long"}}\n</tool_call>'
    tokenized = TurnTemplate.after_turn

    def after_turn(self, messages):
        render = tokenized(self, messages)
        return lambda observations: (lengths.append(len(str(observations))), render(observations))[1]

    monkeypatch.setattr(TurnTemplate, "after_turn", after_turn)
    (trajectory,), _ = roll([call, "done"], [odd], dialect="native")
    assert trajectory.stop_reason is StopReason.MAX_TOKENS and len(trajectory.completion) == 1
    assert lengths and max(lengths) < 1000


# Failures


def broken(number):
    if current_rollout().prompt_index == 1:
        raise ToolFailure("no interpreter")
    return "x"


def test_the_machines_failure_is_never_evidence():
    judged = []

    def reward(prompts, completions, **columns):
        judged.extend(prompts)
        return [0.0] * len(prompts)

    prompts = rows(3)
    trajectories, engine = roll([CODE, ANSWER], [Echo(broken)], prompts, tool_retries=0, reward_funcs=reward)
    assert [t.stop_reason for t in trajectories] == [StopReason.ANSWERED, StopReason.TOOL_FAILED, StopReason.ANSWERED]
    assert [t.verdict for t in trajectories] == [Verdict.INCORRECT, Verdict.UNDECIDED, Verdict.INCORRECT]
    assert trajectories[1].reward is None and trajectories[1].info["tool_failure"] == "no interpreter"
    assert prompts[1]["prompt"] not in judged and len(judged) == 2
    assert sorted(engine.released) == [f"0/current/{i}/0" for i in range(3)]


def test_too_many_failures_stop_the_run():
    def mostly_broken(number):
        raise ToolFailure("no interpreter")

    with pytest.raises(TooManyToolFailures, match="20 of 20 trajectories.*no interpreter"):
        roll([CODE, ANSWER], [Echo(mostly_broken)], rows(40), tool_retries=0)
    trajectories, _ = roll([CODE, ANSWER], [Echo(mostly_broken)], rows(40), tool_retries=0, max_tool_failure_share=1.0)
    assert {t.stop_reason for t in trajectories} == {StopReason.TOOL_FAILED}


def test_the_engines_error_surfaces_as_it_is_and_everything_is_released():
    def script(prompt_text, sampling, session):
        if session == "0/current/2/0":
            raise ZeroDivisionError("engine")
        return CODE

    engine = ScriptedEngine(script, TOKENIZER)
    config = RolloutConfig(
        num_generations=1, dialect="fenced", max_tool_calling_iterations=10**6, max_trajectory_tokens=10**6
    )
    with pytest.raises(ZeroDivisionError, match="engine"):
        generate_trajectories(rows(4), engine, [Echo()], config, progress=False)
    assert sorted(engine.released) == [f"0/current/{i}/0" for i in range(4)]


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal has it: a shell starts what it puts in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("inside_a_loop", [False, True])
def test_an_interrupt_ends_every_session_before_it_surfaces(inside_a_loop, interruptible):
    closed = []

    class Interrupting(Echo):
        def open(self):
            session = super().open()
            session.close = lambda: closed.append(session)
            return session

    async def reply(number):
        if current_rollout().prompt_index == 2:
            os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    async def cell():
        return roll([CODE], [Interrupting(reply)], rows(3))

    with pytest.raises(KeyboardInterrupt):
        if inside_a_loop:
            asyncio.new_event_loop().run_until_complete(cell())
        else:
            roll([CODE], [Interrupting(reply)], rows(3))
    assert len(closed) == 3


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "words"),
    [
        ([{"prompt": "text"}], {}, ValueError, "Row 0: `prompt` is not a list of messages"),
        (
            [{"prompt": [{"role": "critic", "content": "?"}]}],
            {},
            ValueError,
            "Row 0: `prompt`: message 0 has the role",
        ),
        ([], {}, ValueError, "empty"),
        (iter(rows()), {}, TypeError, "cannot be counted"),
        (rows(), {"max_trajectory_tokens": 50}, ValueError, "leaves no room for a turn"),
        (rows(), {"policy": "a/b"}, ValueError, "names files"),
        (rows(), {"prompt_indices": [0, 1]}, ValueError, "2 entries for 1 prompts"),
        (rows(), {"reward_funcs": []}, ValueError, "reward_funcs"),
        (rows(), {"tools": [add], "dialect": "fenced"}, ValueError, "one required text argument"),
    ],
)
def test_the_users_mistakes_raise_before_anything_is_sampled(prompts, settings, error, words):
    engine = ScriptedEngine([ANSWER], TOKENIZER)
    settings = dict(settings)
    names = {k: settings.pop(k) for k in list(settings) if k not in RolloutConfig.__dataclass_fields__}
    tools = names.pop("tools", [Echo()])
    with pytest.raises(error, match=words):
        config = RolloutConfig(num_generations=1, **settings)
        generate_trajectories(prompts, engine, tools, config, progress=False, **names)
    assert engine.calls == []


@pytest.mark.parametrize(
    "settings",
    [
        {"num_generations": 0},
        {"previous_policy_generations": 31},
        {"temperature": -1.0},
        {"temperature_variants": [0.7, -1.0]},
        {"top_p": 0.0},
        {"dialect": "xml"},
        {"max_turn_tokens": 0},
        {"stop_strings": "x"},
        {"tool_timeout_seconds": 0},
        {"max_tool_failure_share": 1.5},
        {"answer_pattern": "("},
        {"chat_template_kwargs": "{"},
    ],
)
def test_the_configuration_is_checked_when_it_is_made(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name.removesuffix("_variants")):
        RolloutConfig(**settings)


# Verdicts


def test_rewards_see_trls_arguments_and_decide_the_verdict():
    def reward(prompts, completions, completion_ids, answer, **columns):
        return [None if a == "2" else float(a == "1") for a in answer]

    async def bonus(completions, **columns):
        return [0.25 for _ in completions]

    trajectories, _ = roll([CODE, ANSWER], prompts=rows(3), reward_funcs=[reward, bonus], reward_weights=[1.0, 2.0])
    assert [t.verdict for t in trajectories] == [Verdict.CORRECT, Verdict.CORRECT, Verdict.UNDECIDED]
    assert [t.reward for t in trajectories] == [0.5, 1.5, None]
    assert trajectories[1].info["rewards"] == {"reward": 1.0, "bonus": 0.25}


def test_without_rewards_nothing_is_decided():
    (trajectory,), _ = roll([ANSWER])
    assert trajectory.verdict is Verdict.UNDECIDED and trajectory.reward is None


def test_a_slow_verifier_holds_up_no_rollout():
    released = threading.Event()

    def reward(completions, **columns):
        assert released.wait(30)  # set by the last rollout: judging on the rollouts' path would never get there
        return [1.0] * len(completions)

    def script(prompt_text, sampling, session):
        if session == "0/current/7/0" and "```output" in prompt_text:
            released.set()
        return ANSWER if "```output" in prompt_text else CODE

    trajectories, _ = roll(script, prompts=rows(8), reward_funcs=reward, max_concurrent_trajectories=1)
    assert {t.verdict for t in trajectories} == {Verdict.CORRECT}


def test_an_error_of_a_reward_function_on_every_trajectory_surfaces():
    def reward(completions, **columns):
        raise ZeroDivisionError("reward")

    with pytest.raises(TooManyRewardErrors, match="3 of 3 trajectories.*ZeroDivisionError: reward") as raised:
        roll([CODE, ANSWER], prompts=rows(3), reward_funcs=reward)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


# Environments, prompts, provenance


class Counter:
    """Counts up to a goal."""

    def reset(self, goal: int, **row) -> str:
        self.count, self.goal = 0, goal
        return f" Reach {goal}."

    def increment(self, step: int) -> str:
        """
        Adds to the counter.

        Args:
            step: How much.
        """
        self.count += step
        return f"count is {self.count}"

    def get_reward(self) -> float:
        return float(self.count == self.goal)

    @property
    def done(self) -> bool:
        return self.count >= self.goal


def test_an_environment_plays_along_and_owns_its_reward():
    step = '<tool_call>\n{"name": "increment", "arguments": {"step": 2}}\n</tool_call>'
    prompts = [{"prompt": [user("Play.")], "goal": goal} for goal in (4, 3)]
    trajectories, _ = roll([step] * 5, [], prompts, dialect="native", environment_factory=Counter)
    assert [t.prompt[-1]["content"] for t in trajectories] == ["Play. Reach 4.", "Play. Reach 3."]
    assert [t.verdict for t in trajectories] == [Verdict.CORRECT, Verdict.INCORRECT]
    for trajectory in trajectories:
        assert trajectory.stop_reason is StopReason.ANSWERED  # the environment was done
        assert trajectory.num_turns == 2 and trajectory.completion[-1]["role"] == "assistant"
        assert trajectory.info["final_observation"] == "count is 4"
    assert prompts[0]["prompt"] == [user("Play.")], "the row was changed"


class Corridor:
    """A text environment: three steps east lead out."""

    def reset(self, **row) -> str:
        self.place = 0
        return "You are in a corridor."

    def act(self, command: str) -> str:
        """
        Acts.

        Args:
            command: What to do.
        """
        self.place += command == "go east"
        return f"Place {self.place}."

    def get_reward(self) -> float:
        return float(self.done)

    @property
    def done(self) -> bool:
        return self.place == 3


def test_a_text_environment_answers_every_turn_in_a_user_turn():
    script = ["Action: go east", "I think.", "Action: go east", "Action: go west", "Action: go east"]
    (trajectory,), _ = roll(script, [], dialect="action", environment_factory=Corridor)
    assert trajectory.verdict is Verdict.CORRECT and trajectory.info["final_observation"] == "Place 3."
    observations = [message["content"] for message in trajectory.completion[1::2]]
    assert observations == [
        "Place 1.",
        "SyntaxError: write `Action:` and one action after it.",
        "Place 2.",
        "Place 2.",
    ]
    assert render_actions(TOKENIZER, trajectory.to_dict()) == [text + "<|im_end|>" for text in script]


def test_what_a_policy_imagines_after_its_action_is_no_part_of_the_trajectory():
    script = ["Action: go east\nPlace 1.\nAction: go east", "Action: go east\n", "Action: go east\nObservation:"]
    (trajectory,), _ = roll(script, [], dialect="action", environment_factory=Corridor)
    assert trajectory.verdict is Verdict.CORRECT and trajectory.num_turns == 3
    kept = ["Action: go east", "Action: go east\n", "Action: go east"]
    assert [message["content"] for message in trajectory.completion[::2]] == kept
    # only the second turn was ended by the policy itself
    sampled = [text + end for text, end in zip(kept, ["", "<|im_end|>", ""], strict=True)]
    assert render_actions(TOKENIZER, trajectory.to_dict()) == sampled


def test_an_environment_that_does_not_start_is_the_machines_failure():
    class Broken(Counter):
        def reset(self, **row):
            raise ToolFailure("no game")

    (trajectory,), _ = roll([], [], rows(goal=1), dialect="native", environment_factory=Broken, tool_retries=0)
    assert trajectory.stop_reason is StopReason.TOOL_FAILED and trajectory.completion_ids == []


def test_a_first_observation_that_leaves_no_room_is_the_users_mistake():
    class Wordy(Corridor):
        def reset(self, **row) -> str:
            return "You are in a corridor. " * 100

    with pytest.raises(ValueError, match="Row 0: the prompt has .* tokens, which leaves no room"):
        roll([], [], dialect="action", environment_factory=Wordy)


def test_the_system_prompt_is_for_prompts_that_have_none():
    prompts = [rows()[0], {"prompt": [{"role": "system", "content": "mine"}, user("q")]}]
    trajectories, _ = roll([ANSWER], prompts=prompts, system_prompt="theirs")
    assert [t.prompt[0]["content"] for t in trajectories] == ["theirs", "mine"]


def test_provenance_says_what_made_the_row():
    (trajectory,), _ = roll([CODE, ANSWER], temperature=0.7, iteration=2, policy="previous", policy_revision="abc")
    info = trajectory.info
    assert (info["iteration"], info["policy"], info["policy_revision"]) == (2, "previous", "abc")
    assert info["engine"]["engine"] == "scripted" and info["sampler"]["temperature"] == 0.7
    assert info["tools"] == {"python": "echo-1"} and info["dialect"] == "fenced"
    assert info["verifiers"] == {"rewards": {}, "weights": [], "threshold": 0.5, "missing": "undecided"}
    other = byte_tokenizer("qwen2_5")
    other.chat_template += "{# edited #}"
    (edited,), _ = roll([CODE, ANSWER], tokenizer=other)
    assert edited.info["tokenizer"] == info["tokenizer"] and edited.info["chat_template"] != info["chat_template"]


def test_provenance_tells_one_verifier_from_another():
    def strict(completions, **columns):
        return [0.0] * len(completions)

    def lenient(completions, tolerance=1, **columns):
        return [float(tolerance)] * len(completions)

    lenient.__name__ = "strict"
    funcs = [strict, strict, lenient, partial(lenient, tolerance=2), partial(lenient, tolerance=3)]
    found = [roll([ANSWER], reward_funcs=func)[0][0].info["verifiers"]["rewards"]["strict"] for func in funcs]
    assert found[0] == found[1] and found[0].startswith("source:")
    assert len({str(version) for version in found}) == 4


def test_what_a_verifier_was_given_counts_and_is_told_nobody():
    def graded(completions, key="", table=None, **columns):
        return [1.0] * len(completions)

    circle = []
    circle.append(circle)
    tables = [{(1, 2): 3}, {1: 2, "a": 3}, circle]
    given = [{"key": "secret-1"}, {"key": "secret-2"}, *({"table": table} for table in tables)]
    versions = [version_of(partial(graded, **arguments)) for arguments in given]
    assert versions == [version_of(partial(graded, **arguments)) for arguments in given]
    assert len(set(versions[:3])) == 3 and "secret" not in json.dumps(versions)


def test_a_prompt_is_the_same_whatever_its_columns_hold():
    class Picture:
        """Its text holds its address, as that of a decoded image does."""

    assert fingerprint({"image": Picture()}) == fingerprint({"image": Picture()}) != fingerprint({"image": object()})
