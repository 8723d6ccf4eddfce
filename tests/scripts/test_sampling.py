"""Which engine flags ask for; what is handed to vLLM is checked without it."""

from __future__ import annotations

import pytest
from trl import ModelConfig

from tests.support import byte_tokenizer, tiny_model
from trl_multiturn import RolloutConfig, TransformersEngine
from trl_multiturn.engines.vllm import engine as vllm_engine, server as vllm_server
from trl_multiturn.scripts.arguments import EngineArguments
from trl_multiturn.scripts.sampling import engine_factory, own_servers, vllm_rank


ROLLOUT = RolloutConfig(max_trajectory_tokens=700)


class Recorded:
    """Stands where an engine class stands, and keeps what it was given."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs


def test_without_vllm_the_policy_samples_by_itself():
    tokenizer = byte_tokenizer("qwen2_5")
    engine = engine_factory(EngineArguments(rollout_batch_size=5), ModelConfig(), ROLLOUT)(
        tiny_model(tokenizer), tokenizer
    )
    assert isinstance(engine, TransformersEngine) and engine.max_batch_size == 5


def test_vllm_in_this_process_gets_model_context_and_adapters(monkeypatch):
    monkeypatch.setattr(vllm_engine, "VLLMEngine", Recorded)
    model = ModelConfig(model_name_or_path="folder", use_peft=True, lora_r=12)
    flags = EngineArguments(use_vllm=True, vllm_gpu_memory_utilization=0.4, vllm_enable_sleep_mode=True)
    engine = engine_factory(flags, model, ROLLOUT)(None, "tokenizer")
    assert engine.args == ("folder", "tokenizer")
    expected = {"gpu_memory_utilization": 0.4, "max_model_len": 700, "enable_sleep_mode": True, "enable_lora": True}
    assert expected.items() <= engine.kwargs.items() and engine.kwargs["max_lora_rank"] == 16


def test_a_server_is_spoken_to_where_it_listens(monkeypatch):
    monkeypatch.setattr(vllm_server, "VLLMServerEngine", Recorded)
    flags = EngineArguments(use_vllm=True, vllm_mode="server", vllm_server_base_url=["http://there:1"])
    engine = engine_factory(flags, ModelConfig(), ROLLOUT)(None, "tokenizer")
    assert engine.args[:2] == (["http://there:1"], "tokenizer")


@pytest.mark.parametrize(("rank", "started"), [(1, 8), (8, 8), (9, 16), (500, 512)])
def test_vllm_is_started_for_a_rank_that_it_knows(rank, started):
    assert vllm_rank(rank) == started


def test_a_rank_beyond_vllm_is_refused():
    with pytest.raises(ValueError, match="rank 512 at most"):
        vllm_rank(513)


@pytest.mark.parametrize(
    ("processes", "rank", "servers", "own"),
    [(1, 0, "ab", "ab"), (2, 0, "abc", "ac"), (2, 1, "abc", "b"), (2, 1, "a", "a")],
)
def test_every_process_has_servers_of_its_own_but_for_adapters(monkeypatch, processes, rank, servers, own):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", str(rank))
    assert own_servers(list(servers), adapters=True) == list(own)
    if len(servers) < processes:
        with pytest.raises(ValueError, match="2 processes train whole weights.*names 1 servers"):
            own_servers(list(servers), adapters=False)


def test_several_processes_do_not_start_vllm_on_one_device(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    with pytest.raises(ValueError, match="first of the 8 devices"):
        engine_factory(EngineArguments(use_vllm=True), ModelConfig(), ROLLOUT)
