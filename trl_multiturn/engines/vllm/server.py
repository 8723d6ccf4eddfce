"""An engine somewhere else: a vLLM server, spoken to with token ids over HTTP."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ..beside import PolicyBeside
from ..engine import Engine, FinishReason, Generation, SamplingParams
from .connection import SERVER_OPTIONS, ServerConnection, ServerFailed, WrongAnswer


class VLLMServerEngine:
    """Samples with a vLLM server through its OpenAI-compatible completions, token ids in and out.

    Start the server with `vllm serve <model> --logprobs-mode processed_logprobs`, so that log-probabilities are those
    of the distribution drawn from (checked here with one request); with `VLLM_SERVER_DEV_MODE=1` for [`refresh`] of
    whole checkpoints, [`sleep`] and [`wake_up`], and with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 … --enable-lora
    --max-lora-rank <rank>` for LoRA policies. Checkpoint folders are read by the server: they have to be at the same
    path there. Processes that train with full weights need a server each, as one server holds one set of weights.

    Every call of `generate` is one request from a pool of connections, closed where the caller is cancelled, upon
    which the server stops sampling. What may pass by itself (a server that restarts, 429, 5xx, a broken answer) is
    tried again for `patience_seconds`. A server that was restarted is given the policy's weights again before it
    samples another token.

    With several servers each trajectory stays on one, which keeps its prefix; where that one is away, the trajectory
    goes on at another. Each of them may be a group (`vllm serve --data-parallel-size`), on this machine or another.

    Args:
        base_url (`str` or `Sequence[str]`):
            E.g. `"http://localhost:8000"`; several servers of the same model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_concurrency (`int`, *optional*, defaults to `1024`):
            Most connections at once to a server; more requests wait here.
        timeout_seconds (`float`, *optional*, defaults to `600.0`):
            How long one turn, or one command, may take.
        api_key (`str`, *optional*):
            Sent as a bearer token.
        patience_seconds (`float`, *optional*, defaults to `120.0`):
            How long a server may be away, or answer wrongly, before a turn fails.

    Raises:
        ConnectionError: if no server answers at `base_url`.
        ValueError: if it reports log-probabilities of another distribution, or the servers have different models.
    """

    weights: Literal["shared", "own"] = "own"

    def __init__(
        self,
        base_url: str | Sequence[str],
        processing_class: PreTrainedTokenizerBase,
        max_concurrency: int = 1024,
        timeout_seconds: float = 600.0,
        api_key: str | None = None,
        patience_seconds: float = 120.0,
    ) -> None:
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if not urls:
            raise ValueError("`base_url` names no server. Pass the address of one, or a list of them.")
        self.processing_class = processing_class
        self._vocabulary = len(processing_class)
        self._lock = threading.Lock()
        self._name = token_hex(4)  # no other process, nor an earlier run, has adapters of this name at the server
        self._adapters = itertools.count(1)
        self._sessions: dict[str, _Server] = {}
        self._servers = [
            _Server(url.rstrip("/").removesuffix("/v1"), max_concurrency, timeout_seconds, patience_seconds, api_key)
            for url in urls
        ]
        for server in self._servers:
            server.read_card()
            self._check_logprobs_mode(server)
        lengths = {server.max_model_len for server in self._servers}
        if len(lengths) > 1:
            raise ValueError(f"The servers have different `max_model_len` ({sorted(lengths)}). Start them alike.")

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, session: str | None = None
    ) -> Generation:
        """Samples one turn after `prompt_ids`; see [`Engine.generate`].

        Raises:
            ValueError: if the server refuses the request, e.g. as longer than its `max_model_len`.
            ConnectionError: if every server is away, or fails, for longer than `patience_seconds`.
        """
        return await self._submit(prompt_ids, sampling, session, None)

    async def _submit(
        self, prompt_ids: list[int], sampling: SamplingParams, session: str | None, adapter: str | None
    ) -> Generation:
        """Samples one turn with the adapter of a name, or with the policy's weights."""
        server, away = self._server_of(session), set[_Server]()
        while True:
            try:
                return await server.complete(_request(prompt_ids, sampling), self._vocabulary, adapter)
            except ServerFailed:
                away.add(server)
                others = [other for other in self._servers if other not in away]
                if not others:
                    raise
                server = self._move(session, others)

    def _server_of(self, session: str | None) -> _Server:
        """The server that keeps a trajectory's prefix; a new trajectory goes where least is in flight."""
        with self._lock:
            if session in self._sessions:
                return self._sessions[session]
        return self._move(session, self._servers)

    def _move(self, session: str | None, servers: list[_Server]) -> _Server:
        with self._lock:
            held = list(self._sessions.values())
            server = min(servers, key=lambda one: (one.connection.in_flight, held.count(one)))
            if session is not None:
                self._sessions[session] = server
            return server

    def release(self, session: str) -> None:
        """Forgets which server a trajectory was on; the server's prefix cache evicts by use."""
        with self._lock:
            self._sessions.pop(session, None)

    def refresh(self, model_path: str | None = None) -> None:
        """Has every server load the policy's new weights; see [`VLLMEngine.refresh`]. The folder has to be at the same
        path on the servers' machines."""
        in_flight = sum(server.connection.in_flight for server in self._servers)
        if in_flight:
            raise RuntimeError(
                f"`refresh` was called while {in_flight} requests are being generated, so their turns would "
                "mix two policies. Await or cancel them first."
            )
        if model_path is None or not Path(model_path).is_dir():
            raise ValueError(
                f"The server would go on with the old weights: `model_path={model_path!r}` is no folder. Pass the "
                "folder of the policy's newest checkpoint."
            )
        folder, adapter = str(Path(model_path).resolve()), self._new_adapter()
        self._at_all(lambda server: server.load(folder, adapter))

    samples_beside = True

    def beside(self, model_path: str) -> Engine:
        """An engine that samples with the LoRA adapter in `model_path` while this one samples with its own weights;
        see [`SamplesBeside`]. Start the server with `--max-loras 2`, so that both share batches."""
        folder, adapter = str(Path(model_path).resolve()), self._new_adapter()
        self._at_all(lambda server: server.add(folder, adapter))

        async def generate(prompt_ids: list[int], sampling: SamplingParams, session: str | None) -> Generation:
            return await self._submit(prompt_ids, sampling, session, adapter)

        return PolicyBeside(self, generate)

    def _new_adapter(self) -> str:
        # A new name each time: no prefix of an earlier policy is taken for this one's.
        return f"policy-{self._name}-{next(self._adapters)}"

    def sleep(self, level: int = 1) -> None:
        """Frees the servers' devices while the trainer works; see [`VLLMEngine.sleep`]."""
        self._at_all(lambda server: server.connection.command(f"/sleep?level={level}", {}))

    def wake_up(self) -> None:
        """Takes the devices' memory back after [`sleep`]."""
        self._at_all(lambda server: server.connection.command("/wake_up", {}))

    def _at_all(self, do: Any) -> None:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(do, self._servers))

    def describe(self) -> dict[str, Any]:
        """Name, version and settings; not the weights, so that a run taken up again finds the engine it had."""
        first = self._servers[0]
        return {
            "engine": "vllm_server",
            "vllm_version": first.version,
            "model": first.model,
            "max_model_len": first.max_model_len,
        }

    def _check_logprobs_mode(self, server: _Server) -> None:
        """With `top_k=1` one token is left, so the distribution drawn from gives it probability 1."""
        request = _request([0], SamplingParams(1, top_k=1)) | {"model": server.model}
        answer = server.connection.command("/v1/completions", request)
        (logp,) = _generation(answer, self._vocabulary).logps
        if logp < -1e-4:
            raise ValueError(
                f"The server reports log-probabilities before temperature and truncation ({logp:.3f} where only one "
                f"token was left), so they are not the behavior policy's. Start it as `{SERVER_OPTIONS}`."
            )


class _Server:
    """One server: what it serves, and the weights that it was last given."""

    def __init__(
        self, url: str, max_concurrency: int, timeout_seconds: float, patience_seconds: float, api_key: str | None
    ) -> None:
        self.connection = ServerConnection(
            url, self._load_again, max_concurrency, timeout_seconds, patience_seconds, api_key
        )
        self._folder: str | None = None  # of whole weights
        self._adapter: str | None = None
        self._adapters: dict[str, str] = {}  # name -> folder, the policy's and those beside it

    def read_card(self) -> None:
        """Asks the server what it is."""
        # a first sign of life is not waited for: an address may be wrong
        self.version = self.connection.command("/version", patience_seconds=0.0)["version"]
        card = self.connection.command("/v1/models")["data"][0]
        self.model, self.max_model_len = card["id"], card["max_model_len"]
        self.connection.remember()

    async def complete(self, request: dict[str, Any], vocabulary: int, adapter: str | None) -> Generation:
        """Samples one turn."""
        request = request | {"model": adapter or self._adapter or self.model}
        return await self.connection.post("/v1/completions", request, lambda answer: _generation(answer, vocabulary))

    def load(self, folder: str, adapter: str) -> None:
        """Loads a checkpoint, or an adapter under the given name, in the place of what there was."""
        earlier = [*self._adapters]
        if (Path(folder) / "adapter_config.json").exists():
            self.add(folder, adapter)
            self._adapter = adapter
        else:
            self._reload(folder)
            self._folder, self._adapter = folder, None
        self.connection.remember()
        for name in earlier:
            self.connection.command("/v1/unload_lora_adapter", {"lora_name": name})
            del self._adapters[name]

    def add(self, folder: str, adapter: str) -> None:
        """Loads an adapter beside what there is."""
        self.connection.command("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": folder})
        self._adapters[adapter] = folder

    def _reload(self, folder: str) -> None:
        self.connection.command("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self.connection.command("/reset_prefix_cache", {})

    def _load_again(self) -> None:
        """After a restart: the server has forgotten the weights that it was given."""
        if self._folder is not None:
            self._reload(self._folder)
        for adapter, folder in self._adapters.items():
            self.connection.command("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": folder})


def _request(prompt_ids: list[int], sampling: SamplingParams) -> dict[str, Any]:
    return {
        "prompt": list(prompt_ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "seed": None if sampling.seed is None else sampling.seed % 2**63,
        "stop_token_ids": list(sampling.stop_token_ids),
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def _generation(answer: Any, vocabulary: int) -> Generation:
    """The turn in an answer; [`WrongAnswer`] for one that is incomplete or impossible."""
    try:
        (choice,) = answer["choices"]
        token_ids, logps = list(choice["token_ids"]), [float(logp) for logp in choice["logprobs"]["token_logprobs"]]
        reason, stopped_by = choice["finish_reason"], choice.get("stop_reason")
    except (KeyError, TypeError, ValueError) as error:
        raise WrongAnswer(f"an answer without {error}") from error
    if reason == "stop" and isinstance(stopped_by, str):
        reason = "stop_string"
    if reason not in ("stop", "stop_string", "length"):
        raise WrongAnswer(f"a request that ended with {reason!r}, so the turn is not complete")
    if len(token_ids) != len(logps) or not token_ids:
        raise WrongAnswer(f"{len(token_ids)} token ids with {len(logps)} log-probabilities")
    if any(not isinstance(token, int) or not 0 <= token < vocabulary for token in token_ids):
        raise WrongAnswer(f"token ids outside of the vocabulary of {vocabulary}: {token_ids[:20]}")
    if not all(math.isfinite(logp) and logp <= 1e-3 for logp in logps):
        raise WrongAnswer(f"numbers that are no log-probabilities: {logps[:20]}")
    return Generation(token_ids, logps, _FINISH[reason])


_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "stop_string": "stop_string",
    "length": "length",
}
