"""A real `vllm serve` on a CPU, in an environment of its own (`.ci/requirements-vllm.txt`): `pytest -m vllm`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.engines.test_vllm_engine import SIZES, TOKENIZER, expected_logps, needs_vllm, prompt, run
from tests.launch import free_port
from tests.support import save_tiny, tiny_model
from trl_multiturn.engines.engine import Engine, SamplingParams
from trl_multiturn.engines.transformers.engine import TransformersEngine
from trl_multiturn.engines.vllm.server import VLLMServerEngine


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a server with the weights of seed 0."""
    folder = save_tiny(tmp_path_factory.mktemp("policy"), TOKENIZER, seed=0, **SIZES)
    port = free_port()
    options = "--dtype float32 --max-model-len 512 --enforce-eager --kv-cache-memory-bytes 67108864"
    options += " --enable-lora --max-lora-rank 8 --logprobs-mode processed_logprobs"
    # `vllm serve` itself looks for a distribution of the name `vllm`, which the CPU build has not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", str(port)]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with open(log, "w") as out:
        process = subprocess.Popen([*command, *options.split()], env=environment, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 400
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:  # what it is to answer has been answered
            process.kill()
            process.wait()


class TestVLLMServerEngine:
    pytestmark = [*needs_vllm, pytest.mark.slow]

    @pytest.fixture
    def engine(self, server, tmp_path):
        engine = VLLMServerEngine(server, TOKENIZER, max_concurrency=8)
        engine.refresh(save_tiny(tmp_path / "start", TOKENIZER, seed=0, **SIZES))
        return engine

    def test_it_agrees_with_the_transformers_engine(self, engine):
        assert isinstance(engine, Engine)
        requests = [(prompt(n, seed=n), SamplingParams(12, temperature=0)) for n in (1, 30, 7, 100)]
        policy = tiny_model(TOKENIZER, seed=0, **SIZES).eval()
        for a, b in zip(run(engine, *requests), run(TransformersEngine(policy, TOKENIZER), *requests), strict=True):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-4, rtol=1e-4)
        params = SamplingParams(10, temperature=0.6, top_p=0.8, seed=2)
        (sampled,) = run(engine, (prompt(9), params))
        expected = expected_logps(policy, prompt(9), sampled, params)
        torch.testing.assert_close(torch.tensor(sampled.logps), expected, atol=1e-4, rtol=1e-4)

    def test_seeds_and_ends(self, engine):
        request = (prompt(8), SamplingParams(20, seed=2**64 - 1))
        (free,) = run(engine, request)
        crowd = run(engine, *((prompt(n, seed=n), SamplingParams(n, seed=n)) for n in range(1, 20)), request)
        assert crowd[-1].token_ids == free.token_ids
        stop = free.token_ids[7]
        end = free.token_ids.index(stop) + 1
        (stopped,) = run(engine, (prompt(8), SamplingParams(20, seed=2**64 - 1, stop_token_ids=(stop,))))
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:end], "stop")
        letter = next(i for i, token in enumerate(free.token_ids) if TOKENIZER.decode([token]).isascii())
        string = TOKENIZER.decode([free.token_ids[letter]])
        (stopped,) = run(engine, (prompt(8), SamplingParams(20, seed=2**64 - 1, stop_strings=(string,))))
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[: letter + 1], "stop_string")

    def test_refresh_loads_checkpoints_and_adapters(self, engine, tmp_path):
        request = (prompt(40), SamplingParams(8, temperature=0))
        adapted = get_peft_model(
            tiny_model(TOKENIZER, seed=0, **SIZES),
            LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["q_proj", "v_proj"]),
        )
        other = tiny_model(TOKENIZER, seed=5, **SIZES)
        for name, model in (("adapter", adapted), ("other", other)):
            run(engine, request)
            model.save_pretrained(tmp_path / name)
            engine.refresh(str(tmp_path / name))
            (generation,), (expected,) = run(engine, request), run(TransformersEngine(model, TOKENIZER), request)
            assert generation.token_ids == expected.token_ids
            torch.testing.assert_close(
                torch.tensor(generation.logps), torch.tensor(expected.logps), atol=1e-3, rtol=1e-3
            )
        with pytest.raises(ValueError, match="would go on with the old weights"):
            engine.refresh()

    def test_refusals_and_cancellations(self, engine):
        with pytest.raises(ValueError, match="refused the request.*600"):
            run(engine, (prompt(600), SamplingParams(1)))

        async def main():
            task = asyncio.create_task(engine.generate(prompt(5), SamplingParams(400)))
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="1 requests are being generated"):
                engine.refresh("anything")
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await engine.generate(prompt(5), SamplingParams(3))

        assert len(asyncio.run(main()).token_ids) == 3
