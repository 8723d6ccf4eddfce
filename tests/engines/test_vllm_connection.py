"""What a vLLM server does wrongly for a while ends no run, and never samples with other weights than the policy's."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.engines.fake_vllm import FakeServer, Handler, completion
from tests.support import byte_tokenizer
from trl_multiturn.engines.engine import SamplingParams
from trl_multiturn.engines.vllm import connection
from trl_multiturn.engines.vllm.server import VLLMServerEngine


TOKENIZER = byte_tokenizer("qwen2_5")
SAMPLING = SamplingParams(3, seed=1)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(connection, "_FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(connection, "_LONGEST_WAIT_SECONDS", 0.05)


@pytest.fixture
def server():
    fake = FakeServer()
    yield fake
    fake.stop()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "second").mkdir()
    return str(tmp_path / "second")


@pytest.fixture
def adapter(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    return str(tmp_path / "adapter")


def sample(engine, n: int = 1, sampling: SamplingParams = SAMPLING, prompt: list[int] | None = None):
    async def main():
        calls = (engine.generate(prompt or [5], sampling, session=f"s{i}") for i in range(n))
        return await asyncio.gather(*calls)

    return asyncio.run(main())


def reset(handler: Handler) -> None:
    handler.connection.shutdown(2)
    handler.close_connection = True


FAULTS = {
    "too many requests": lambda h: h.answer(429, {"error": "slow down"}, Retry_After="0.02"),
    "a failure": lambda h: h.answer(500, {"error": "a worker died"}),
    "a gateway": lambda h: h.answer(503, b"<html>no upstream</html>"),
    "a reset": reset,
    "broken JSON": lambda h: h.answer(200, b'{"choices": [{"token_ids": [1, 2'),
    "no choice": lambda h: h.answer(200, {"object": "text_completion"}),
    "an aborted turn": lambda h: h.answer(200, completion([1], finish_reason="abort")),
    "a missing log-probability": lambda h: h.answer(200, completion([1, 2], [-0.5])),
    "a null log-probability": lambda h: h.answer(200, completion([1], [None])),
    "a log-probability that is NaN": lambda h: h.answer(200, b'{"choices": [%s]}' % _nan()),
    "a positive log-probability": lambda h: h.answer(200, completion([1], [0.7])),
    "an id outside of the vocabulary": lambda h: h.answer(200, completion([10**6], [-0.5])),
    "an id that is text": lambda h: h.answer(200, completion(["token_id:7"], [-0.5])),
}


def _nan() -> bytes:
    return b'{"token_ids": [1], "logprobs": {"token_logprobs": [NaN]}, "finish_reason": "length"}'


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again(server, fault):
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=20.0)
    server.faults = [FAULTS[fault]] * 2
    (generation,) = sample(engine)
    assert (generation.token_ids, generation.logps, generation.finish_reason) == ([1, 2, 3], [0.0] * 3, "length")
    assert server.faults == []


@pytest.mark.parametrize(
    "fault, told",
    [
        ("a failure", "status 500.*a worker died"),
        ("broken JSON", "no JSON"),
        ("an id outside of the vocabulary", "outside of the vocabulary.*1000000"),
        ("a null log-probability", "failed at /v1/completions"),
    ],
)
def test_what_lasts_ends_with_what_the_server_said(server, fault, told):
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=0.1)
    server.faults = [FAULTS[fault]] * 1000
    with pytest.raises(ConnectionError, match=told):
        sample(engine)


def test_a_refusal_is_told_at_once(server):
    engine = VLLMServerEngine(server.url, TOKENIZER)
    with pytest.raises(ValueError, match="refused.*status 400.*65 tokens are more than 64"):
        sample(engine, prompt=[5] * 65)


def test_a_server_that_was_restarted_between_turns_gets_its_weights_again(server, folder):
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=20.0)
    engine.refresh(folder)
    sample(engine)
    server.restart()
    sample(engine)
    assert [request["weights"] for request in server.requests[1:]] == ["second", "second"]
    assert server.loads == ["second", "second"]


def test_a_restarted_server_gets_its_adapter_again(server, adapter):
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=20.0)
    engine.refresh(adapter)
    server.restart()
    sample(engine, n=4)
    name = server.loads[0]
    assert server.loads == [name, name]
    assert {request["weights"] for request in server.requests[1:]} == {name}


def test_a_server_that_goes_away_in_the_middle_of_a_turn_costs_no_trajectory(server, folder):
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=20.0)
    engine.refresh(folder)
    begun, away = threading.Event(), threading.Event()

    def die(handler: Handler) -> None:
        begun.set()
        away.wait(20)

    server.faults = [die] * 3

    def kill_and_start() -> None:
        begun.wait(20)
        server.stop()
        away.set()
        server.faults = []
        server.start()

    killer = threading.Thread(target=kill_and_start)
    killer.start()
    generations = sample(engine, n=3)
    killer.join()
    assert [generation.token_ids for generation in generations] == [[1, 2, 3]] * 3
    # One may have been answered before the new process had its weights; that answer is not used
    assert [request["weights"] for request in server.requests[1:]].count("second") == 3


def test_what_a_new_process_answers_before_it_has_the_weights_is_not_used(server, folder):
    """A request that was on its way when the server died, and found the next one."""
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=20.0)
    engine.refresh(folder)

    def new_process(handler: Handler) -> None:
        server.weights, server.started = "first", server.started + 1.0
        for held in server.connections:
            if held is not handler.connection:
                held.shutdown(2)
        handler.answer(200, completion([9]))

    server.faults = [new_process]
    (generation,) = sample(engine)
    assert generation.token_ids == [1, 2, 3] and server.loads == ["second", "second"]


def test_a_broken_connection_alone_reloads_nothing(server, folder):
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=20.0)
    engine.refresh(folder)
    server.faults = [reset]
    sample(engine)
    assert server.loads == ["second"]


def test_trajectories_stay_on_the_server_that_holds_their_prefix(server):
    other = FakeServer()
    try:
        engine = VLLMServerEngine([server.url, other.url], TOKENIZER)
        for _ in range(3):
            sample(engine, n=4)
        seen = [[tuple(r["prompt"]) for r in fake.requests[1:]] for fake in (server, other)]
        assert [len(prompts) for prompts in seen] == [6, 6]
        assert len(engine._sessions) == 4
        for i in range(4):
            engine.release(f"s{i}")
        assert engine._sessions == {}
    finally:
        other.stop()


def test_a_trajectory_goes_on_at_another_server_where_its_own_is_away(server, folder):
    other = FakeServer()
    engine = VLLMServerEngine([server.url, other.url], TOKENIZER, patience_seconds=0.2)
    engine.refresh(folder)
    sample(engine, n=2)
    other.stop()
    generations = sample(engine, n=2)
    assert [generation.token_ids for generation in generations] == [[1, 2, 3]] * 2
    assert server.loads == ["second"]


def test_at_most_so_many_requests_are_under_way(server):
    engine = VLLMServerEngine(server.url, TOKENIZER, max_concurrency=2)
    server.seconds = 0.02
    sample(engine, n=8)
    assert server.most_at_once == 2


def test_a_refresh_in_the_middle_of_a_turn_is_refused(server, folder):
    engine = VLLMServerEngine(server.url, TOKENIZER)
    begun, go = threading.Event(), threading.Event()

    def hold(handler: Handler) -> None:
        begun.set()
        go.wait(20)
        handler.answer(200, completion([1]))

    server.faults = [hold]

    async def main():
        task = asyncio.create_task(engine.generate([5], SAMPLING))
        await asyncio.to_thread(begun.wait, 20)
        with pytest.raises(RuntimeError, match="1 requests are being generated"):
            engine.refresh(folder)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    go.set()
    engine.refresh(folder)
    assert server.loads == ["second"]


def test_two_policies_are_sampled_from_at_once(server, adapter, tmp_path):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "adapter_config.json").write_text("{}")
    engine = VLLMServerEngine(server.url, TOKENIZER, patience_seconds=20.0)
    engine.refresh(adapter)
    beside = engine.beside(str(tmp_path / "earlier"))
    server.restart()  # and both are there again

    async def main():
        return await asyncio.gather(engine.generate([5], SAMPLING), beside.generate([6], SAMPLING))

    asyncio.run(main())
    now, earlier = server.loads[:2]
    assert {tuple(request["prompt"]): request["weights"] for request in server.requests[1:]} == {
        (5,): now,
        (6,): earlier,
    }
    assert sorted(server.loads[2:]) == sorted([now, earlier])
    engine.refresh(adapter)
    assert server.adapters == {server.loads[-1]}


def test_no_server_at_all_is_named():
    with pytest.raises(ConnectionError, match="No vLLM server answers at http://127.0.0.1:9 "):
        VLLMServerEngine("http://127.0.0.1:9/v1", TOKENIZER)
    with pytest.raises(ValueError, match="names no server"):
        VLLMServerEngine([], TOKENIZER)
