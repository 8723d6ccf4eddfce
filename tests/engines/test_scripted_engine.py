from __future__ import annotations

import asyncio
import time

import pytest

from tests.support import byte_tokenizer
from trl_multiturn.engines.engine import Engine, SamplingParams
from trl_multiturn.engines.scripted_engine import ScriptedEngine


TOKENIZER = byte_tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
PAD = TOKENIZER.pad_token_id
PARAMS = SamplingParams(100, stop_token_ids=(END, PAD))


def say(engine, text="hi", params=PARAMS, session=None):
    return asyncio.run(engine.generate(TOKENIZER.encode(text), params, session=session))


def test_it_is_an_engine():
    assert isinstance(ScriptedEngine([], TOKENIZER), Engine)


def test_text_is_tokenised_and_ended():
    generation = say(ScriptedEngine(["ok"], TOKENIZER, logp=-0.5))
    assert generation.token_ids == TOKENIZER.encode("ok") + [END]
    assert generation.logps == [-0.5] * 3
    assert generation.finish_reason == "stop"


@pytest.mark.parametrize("script", ["ok<|im_end|>", TOKENIZER.encode("ok") + [END]], ids=["text", "ids"])
def test_a_turn_that_ends_itself_is_not_ended_twice(script):
    assert say(ScriptedEngine([script], TOKENIZER)).token_ids == TOKENIZER.encode("ok") + [END]


def test_ids_and_open_turns_stay_as_they_are():
    assert say(ScriptedEngine([[5, 6]], TOKENIZER)).token_ids == [5, 6]
    open_turn = say(ScriptedEngine(["ok"], TOKENIZER, end_turns=False))
    assert (open_turn.token_ids, open_turn.finish_reason) == (TOKENIZER.encode("ok"), "length")


def test_limits_cut():
    long = say(ScriptedEngine(["abcdef"], TOKENIZER), params=SamplingParams(3, stop_token_ids=(END,)))
    assert (long.token_ids, long.finish_reason) == (TOKENIZER.encode("abc"), "length")
    # A turn that fits to the token still finishes with its end.
    exact = say(ScriptedEngine(["ab"], TOKENIZER), params=SamplingParams(3, stop_token_ids=(END,)))
    assert exact.finish_reason == "stop"
    early = say(ScriptedEngine([[5, PAD, 6]], TOKENIZER))
    assert (early.token_ids, early.finish_reason) == ([5, PAD], "stop")
    string = say(ScriptedEngine(["a stop b"], TOKENIZER), params=SamplingParams(50, stop_strings=("stop",)))
    assert (TOKENIZER.decode(string.token_ids), string.finish_reason) == ("a stop", "stop_string")


def test_each_session_has_its_own_place_in_the_script():
    engine = ScriptedEngine(["one", "two"], TOKENIZER, end_turns=False)
    said = [TOKENIZER.decode(say(engine, session=name).token_ids) for name in ("a", "b", "a")]
    assert said == ["one", "one", "two"]
    engine.release("a")
    assert TOKENIZER.decode(say(engine, session="a").token_ids) == "one"
    assert engine.released == ["a"]


def test_scripts_by_session_and_by_callable():
    by_session = ScriptedEngine({"a": ["x"], "b": ["y"]}, TOKENIZER, end_turns=False)
    assert TOKENIZER.decode(say(by_session, session="b").token_ids) == "y"

    def echo(prompt_text, sampling, session):
        return f"{session}: {prompt_text} ({sampling.max_new_tokens})"

    echoed = say(ScriptedEngine(echo, TOKENIZER, end_turns=False), "hello<|im_start|>", session="s")
    assert TOKENIZER.decode(echoed.token_ids) == "s: hello<|im_start|> (100)"


def test_a_script_that_is_over_says_so():
    engine = ScriptedEngine(["one"], TOKENIZER)
    say(engine, session="a")
    with pytest.raises(LookupError, match="asked for turn 2, but its script has 1"):
        say(engine, session="a")
    with pytest.raises(LookupError, match="no session 'c'"):
        say(ScriptedEngine({"a": ["x"]}, TOKENIZER), session="c")
    with pytest.raises(TypeError, match="letter by letter"):
        ScriptedEngine("one", TOKENIZER)


def test_calls_are_recorded():
    engine = ScriptedEngine(["ok"], TOKENIZER)
    generation = say(engine, "hi<|im_end|>", session="a")
    engine.refresh("folder")
    (call,) = engine.calls
    assert call.prompt_text == "hi<|im_end|>"
    assert call.prompt_ids == TOKENIZER.encode("hi<|im_end|>")
    assert (call.sampling, call.session, call.generation) == (PARAMS, "a", generation)
    assert engine.refreshes == ["folder"]


def test_latency_is_awaited_not_slept():
    engine = ScriptedEngine(lambda *_: "ok", TOKENIZER, latency_seconds=0.5)

    async def crowd():
        await asyncio.gather(*(engine.generate([1], PARAMS) for _ in range(40)))

    start = time.monotonic()
    asyncio.run(crowd())
    # One after another it would take twenty seconds, however idle the machine is
    assert 0.5 <= time.monotonic() - start < 15
