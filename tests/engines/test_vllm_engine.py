"""The real vLLM on a CPU, in an environment of its own (`.ci/requirements-vllm.txt`): `pytest -m vllm`."""

from __future__ import annotations

import asyncio
import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.support import byte_tokenizer, save_tiny, tiny_model
from trl_multiturn.engines.engine import Engine, SamplingParams
from trl_multiturn.engines.transformers.engine import TransformersEngine
from trl_multiturn.engines.transformers.sampler import TokenSampler
from trl_multiturn.engines.vllm.engine import VLLMEngine


HAS_VLLM = importlib.util.find_spec("vllm") is not None
needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed in this environment")]

TOKENIZER = byte_tokenizer()
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}  # heads of 32: the smallest vLLM takes


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(len(TOKENIZER), (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(engine, *requests):
    async def gather():
        return await asyncio.gather(*(engine.generate(ids, params) for ids, params in requests))

    return asyncio.run(gather())


@torch.no_grad()
def expected_logps(model, prompt_ids, generation, params):
    """Log-probabilities of the sampled tokens under the distribution that `params` describes."""
    logits = model.eval()(torch.tensor([prompt_ids + generation.token_ids])).logits[0, len(prompt_ids) - 1 : -1]
    logps = []
    for row, token in zip(logits, generation.token_ids, strict=True):
        # Find the draw that gives this token: its log-probability is what the sampler reports.
        grid = (torch.arange(4096) + 0.5) / 4096
        tokens, values = TokenSampler([params] * 4096, torch.device("cpu"))(row.expand(4096, -1), grid)
        hits = (tokens == token).nonzero()
        assert len(hits), "a token that the distribution excludes, or one with less than 1/4096 of the mass"
        logps.append(values[hits[0, 0]])
    return torch.stack(logps)


@pytest.fixture(scope="module")
def policy():
    return tiny_model(TOKENIZER, seed=0, **SIZES).eval()


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("policy"), TOKENIZER, seed=0, **SIZES)
    engine = VLLMEngine(
        folder,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=64 * 2**20,
        enable_lora=True,
        max_lora_rank=8,
    )
    yield engine
    engine.close()
    with pytest.raises(RuntimeError, match="was closed"):
        run(engine, ([1], SamplingParams(1)))


@pytest.fixture
def start_weights(engine, tmp_path):
    """The engine with the weights of `policy`, whatever the test before has loaded."""
    engine.refresh(save_tiny(tmp_path / "start", TOKENIZER, seed=0, **SIZES))
    return engine


class TestVLLMEngine:
    pytestmark = needs_vllm

    def test_it_is_an_engine(self, engine):
        assert isinstance(engine, Engine)
        assert engine.describe()["architecture"] == "Qwen2ForCausalLM"

    def test_it_agrees_with_the_transformers_engine(self, start_weights, policy):
        requests = [(prompt(n, seed=n), SamplingParams(12, temperature=0)) for n in (1, 30, 7, 100)]
        theirs = run(start_weights, *requests)
        ours = run(TransformersEngine(policy, TOKENIZER), *requests)
        for a, b in zip(theirs, ours, strict=True):
            assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
            torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": 0.4},
            {"temperature": 0.5, "top_k": 5},
            {"temperature": 0.6, "top_p": 0.7},
            {"temperature": 0.5, "min_p": 0.1},
        ],
        ids=str,
    )
    def test_log_probabilities_are_those_of_the_distribution_drawn_from(self, start_weights, policy, settings):
        params = SamplingParams(10, seed=1, **settings)
        greedy = SamplingParams(10, temperature=0)
        # A greedy request in the same batch must not change whose distribution is reported.
        sampled, mode = run(start_weights, (prompt(9), params), (prompt(8), greedy))
        for ids, generation, p in ((prompt(9), sampled, params), (prompt(8), mode, greedy)):
            expected = expected_logps(policy, ids, generation, p)
            torch.testing.assert_close(torch.tensor(generation.logps), expected, atol=1e-4, rtol=1e-4)

    def test_a_seeded_request_does_not_depend_on_its_company(self, start_weights):
        request = (prompt(11), SamplingParams(20, seed=2**64 - 1))
        (alone,) = run(start_weights, request)
        crowd = run(
            start_weights, *((prompt(n, seed=n), SamplingParams(n + 1, seed=n)) for n in range(1, 20)), request
        )
        assert crowd[-1].token_ids == alone.token_ids

    def test_turns_end_where_the_caller_says(self, start_weights):
        ids = prompt(8)
        (free,) = run(start_weights, (ids, SamplingParams(20, seed=1)))
        assert (len(free.token_ids), free.finish_reason) == (20, "length")
        end = free.token_ids.index(free.token_ids[7]) + 1
        (stopped,) = run(start_weights, (ids, SamplingParams(20, seed=1, stop_token_ids=(free.token_ids[7],))))
        assert (stopped.token_ids, stopped.finish_reason) == (free.token_ids[:end], "stop")
        # The checkpoint's end-of-sequence token is a token like any other.
        eos = TOKENIZER.eos_token_id
        prompts = [(prompt(5, seed=n), SamplingParams(30, temperature=2.0, seed=n)) for n in range(60)]
        assert any(eos in generation.token_ids[:-1] for generation in run(start_weights, *prompts))

    def test_stop_strings_keep_their_tokens(self, start_weights):
        ids = prompt(8)
        (free,) = run(start_weights, (ids, SamplingParams(60, seed=3, temperature=1.5)))
        letters = [i for i, token in enumerate(free.token_ids) if TOKENIZER.decode([token]).isascii()]
        string = TOKENIZER.decode([free.token_ids[letters[0]]])
        (stopped,) = run(start_weights, (ids, SamplingParams(60, seed=3, temperature=1.5, stop_strings=(string,))))
        assert stopped.token_ids == free.token_ids[: letters[0] + 1]
        assert stopped.finish_reason == "stop_string"

    def test_refresh_loads_a_checkpoint_in_place(self, start_weights, tmp_path):
        request = (prompt(40), SamplingParams(8, temperature=0))
        run(start_weights, request)  # fills the prefix cache with the old policy's keys
        described = start_weights.describe()
        start_weights.refresh(save_tiny(tmp_path / "new", TOKENIZER, seed=7, **SIZES))
        (generation,) = run(start_weights, request)
        model = tiny_model(TOKENIZER, seed=7, **SIZES).eval()
        (expected,) = run(TransformersEngine(model, TOKENIZER), request)
        assert generation.token_ids == expected.token_ids
        torch.testing.assert_close(torch.tensor(generation.logps), torch.tensor(expected.logps), atol=1e-4, rtol=1e-4)
        assert start_weights.describe() == described  # else a run that is taken up again would seem another one

    def test_refresh_swaps_lora_adapters(self, start_weights, policy, tmp_path):
        request = (prompt(40), SamplingParams(8, temperature=0))
        (unadapted,) = run(start_weights, request)
        answers = [unadapted.token_ids]
        for seed in (1, 2):
            config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
            base = tiny_model(TOKENIZER, seed=0, **SIZES)
            torch.manual_seed(seed)
            model = get_peft_model(base, config)
            model.save_pretrained(tmp_path / "adapter")  # the same folder each time, as the loop does
            start_weights.refresh(str(tmp_path / "adapter"))
            (generation,) = run(start_weights, request)
            (expected,) = run(TransformersEngine(model, TOKENIZER), request)
            assert generation.token_ids == expected.token_ids
            torch.testing.assert_close(
                torch.tensor(generation.logps), torch.tensor(expected.logps), atol=1e-3, rtol=1e-3
            )
            answers.append(generation.token_ids)
        assert len({tuple(answer) for answer in answers}) == 3
        start_weights.refresh(save_tiny(tmp_path / "base", TOKENIZER, seed=0, **SIZES))
        assert run(start_weights, request)[0].token_ids == unadapted.token_ids

    def test_two_adapters_are_sampled_from_in_one_batch(self, start_weights, tmp_path):
        models = []
        for seed in (1, 2):
            config = LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
            base = tiny_model(TOKENIZER, seed=0, **SIZES)
            torch.manual_seed(seed)
            models.append(get_peft_model(base, config))
            models[-1].save_pretrained(tmp_path / str(seed))
        assert start_weights.samples_beside
        start_weights.refresh(str(tmp_path / "1"))
        beside = start_weights.beside(str(tmp_path / "2"))
        request = (prompt(40), SamplingParams(8, temperature=0))

        async def main():
            engines = [start_weights, beside] * 3
            return await asyncio.gather(*(engine.generate(*request) for engine in engines))

        generations = asyncio.run(main())
        for model, generation in zip(models * 3, generations, strict=True):
            (expected,) = run(TransformersEngine(model, TOKENIZER), request)
            assert generation.token_ids == expected.token_ids
            torch.testing.assert_close(
                torch.tensor(generation.logps), torch.tensor(expected.logps), atol=1e-3, rtol=1e-3
            )
        first, second = (torch.tensor(generation.logps) for generation in generations[:2])
        assert (first - second).abs().max() > 1e-2  # they are two policies

    def test_a_vllm_that_would_lose_its_weights_is_not_asked_to_reload(self, start_weights, tmp_path, monkeypatch):
        request = (prompt(9), SamplingParams(4, temperature=0))
        expected = run(start_weights, request)
        monkeypatch.setattr(start_weights._vllm, "__version__", "0.27.1+cpu")
        with pytest.raises(ValueError, match=r"vLLM 0.27.1\+cpu cannot load in place.*Install vLLM 0.28 or later"):
            start_weights.refresh(save_tiny(tmp_path / "other", TOKENIZER, seed=7, **SIZES))
        assert run(start_weights, request) == expected

    def test_refresh_needs_a_checkpoint_and_quiet(self, engine, tmp_path):
        with pytest.raises(ValueError, match="would go on with the old ones"):
            engine.refresh()
        with pytest.raises(ValueError, match="is no folder"):
            engine.refresh(str(tmp_path / "missing"))

        async def main():
            task = asyncio.create_task(engine.generate(prompt(5), SamplingParams(400)))
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="1 requests are being generated"):
                engine.refresh(str(tmp_path))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        # A cancelled request is aborted; it is in nobody's way.
        engine.refresh(save_tiny(tmp_path / "policy", TOKENIZER, seed=0, **SIZES))
        assert engine._running == set()

    def test_a_request_that_vllm_refuses_fails_alone(self, engine):
        async def main():
            return await asyncio.gather(
                engine.generate(prompt(600), SamplingParams(1)),
                engine.generate(prompt(6), SamplingParams(3)),
                return_exceptions=True,
            )

        refused, answered = asyncio.run(main())
        assert isinstance(refused, ValueError) and "600 tokens" in str(refused)
        with pytest.raises(ValueError, match="temperatures up to 2"):
            run(engine, (prompt(6), SamplingParams(3, temperature=2.5)))
        assert len(answered.token_ids) == 3


@pytest.mark.skipif(HAS_VLLM, reason="vLLM is installed")
def test_without_vllm_the_remedy_is_named():
    with pytest.raises(ImportError, match=r"Install `trl-multiturn\[vllm\]`, or use `TransformersEngine`"):
        VLLMEngine("anything", TOKENIZER)
