"""The engine that a script's flags ask for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl import ModelConfig

from ..engines.engine import Engine
from ..rollout.config import RolloutConfig
from .arguments import EngineArguments


def engine_factory(
    arguments: EngineArguments, model: ModelConfig, rollout: RolloutConfig
) -> Callable[[Any, Any], Engine]:
    """
    A function of model and tokenizer that builds the engine, as [`ToolRolloutGenerator`] takes it.

    Args:
        arguments ([`EngineArguments`]):
            Which engine.
        model ([`~trl.ModelConfig`]):
            Where vLLM loads the policy from first, and the rank of its adapters.
        rollout ([`RolloutConfig`]):
            Its longest trajectory is vLLM's context.
    """
    if not arguments.use_vllm:
        return lambda policy, tokenizer: _transformers(policy, tokenizer, arguments.rollout_batch_size)
    if arguments.vllm_mode == "server":
        urls = own_servers(arguments.vllm_server_base_url, model.use_peft)
        return lambda policy, tokenizer: _server(tokenizer, urls, arguments.vllm_server_timeout)
    _refuse_a_crowded_device()
    return lambda policy, tokenizer: _colocated(tokenizer, arguments, model, rollout)


def _transformers(policy: Any, tokenizer: Any, rollout_batch_size: int) -> Engine:
    from ..engines.transformers.engine import TransformersEngine

    return TransformersEngine(policy, tokenizer, rollout_batch_size)


def own_servers(urls: list[str], adapters: bool) -> list[str]:
    """This process's share of the servers: one server holds one set of whole weights, but several adapters."""
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if len(urls) >= processes:
        return urls[rank::processes]
    if adapters:
        return [urls[rank % len(urls)]]
    raise ValueError(
        f"{processes} processes train whole weights, but `--vllm_server_base_url` names {len(urls)} servers, and one "
        "server holds the weights of one process. Name a server for each, or train adapters (`--use_peft`)."
    )


def _refuse_a_crowded_device() -> None:
    import torch

    processes, devices = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.device_count()
    if processes > 1 and devices > 1:
        raise ValueError(
            f"Each of {processes} processes would start vLLM on the first of the {devices} devices that it sees. "
            "Let the model sample by itself (without `--use_vllm`), or give each process a server "
            "(`--vllm_mode server`)."
        )


def _server(tokenizer: Any, urls: list[str], timeout_seconds: float) -> Engine:
    from ..engines.vllm.server import VLLMServerEngine

    return VLLMServerEngine(urls, tokenizer, timeout_seconds=timeout_seconds)


def _colocated(tokenizer: Any, arguments: EngineArguments, model: ModelConfig, rollout: RolloutConfig) -> Engine:
    from ..engines.vllm.engine import VLLMEngine

    adapters = {"enable_lora": True, "max_lora_rank": vllm_rank(model.lora_r)} if model.use_peft else {}
    return VLLMEngine(
        str(model.model_name_or_path),
        tokenizer,
        gpu_memory_utilization=arguments.vllm_gpu_memory_utilization,
        max_model_len=arguments.vllm_max_model_length or rollout.max_trajectory_tokens,
        tensor_parallel_size=arguments.vllm_tensor_parallel_size,
        enable_sleep_mode=arguments.vllm_enable_sleep_mode,
        model_impl=arguments.vllm_model_impl,
        **adapters,
    )


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def vllm_rank(rank: int) -> int:
    """The smallest rank of adapters that vLLM can be started for and that `rank` fits into."""
    fitting = [known for known in VLLM_RANKS if known >= rank]
    if not fitting:
        raise ValueError(f"vLLM serves adapters of rank {VLLM_RANKS[-1]} at most, got `--lora_r {rank}`. Lower it.")
    return fitting[0]


def load_policy(folder: str | Path, device: Any = None) -> tuple[Any, Any]:
    """A saved policy, plain or adapter, as any user would load it; `(model, tokenizer)`."""
    from transformers import AutoTokenizer

    model = load_model(folder)
    return (model if device is None else model.to(device)), AutoTokenizer.from_pretrained(folder)


def load_model(folder: str | Path, **kwargs: Any) -> Any:
    """
    A saved policy, plain or adapter.

    `AutoPeftModelForCausalLM` would redraw the embeddings where the tokenizer knows more tokens than the model.
    """
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    if not Path(folder, "adapter_config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base), **kwargs), str(folder))
