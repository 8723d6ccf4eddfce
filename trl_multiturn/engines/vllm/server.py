"""An engine somewhere else: a vLLM server, spoken to with token ids over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from ..engine import Generation, SamplingParams


SERVER_OPTIONS = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve … --logprobs-mode processed_logprobs"
)


class VLLMServerEngine:
    """Samples with a vLLM server through its OpenAI-compatible completions, token ids in and out.

    Start the server with `vllm serve <model> --logprobs-mode processed_logprobs`, so that log-probabilities are those
    of the distribution drawn from (checked here with one request); with `VLLM_SERVER_DEV_MODE=1` for [`refresh`] of
    whole checkpoints, [`sleep`] and [`wake_up`], and with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 … --enable-lora
    --max-lora-rank <rank>` for LoRA policies. Checkpoint folders are read by the server: they have to be at the same
    path there. Processes that train with full weights need a server each, as one server holds one set of weights.

    Every call of `generate` is one request on a connection of its own, closed where the caller is cancelled, upon
    which the server stops sampling.

    Args:
        base_url (`str`):
            E.g. `"http://localhost:8000"`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_concurrency (`int`, *optional*, defaults to `1024`):
            Most connections at once; more requests wait here.
        timeout_seconds (`float`, *optional*, defaults to `600.0`):
            How long one turn, or one command, may take.
        api_key (`str`, *optional*):
            Sent as a bearer token.

    Raises:
        ConnectionError: if no server answers at `base_url`.
        ValueError: if it reports log-probabilities of another distribution.
    """

    # The loop hands `refresh` a checkpoint folder.
    loads_checkpoints = True

    def __init__(
        self,
        base_url: str,
        processing_class: PreTrainedTokenizerBase,
        max_concurrency: int = 1024,
        timeout_seconds: float = 600.0,
        api_key: str | None = None,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.processing_class = processing_class
        self.max_concurrency = max_concurrency
        self.timeout_seconds = timeout_seconds
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self._in_flight = 0
        self._gates: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}
        self._adapters = itertools.count(1)
        self._adapter: str | None = None
        self._version = self._command("/version", None)["version"]
        card = self._command("/v1/models", None)["data"][0]
        self._model, self._max_model_len = card["id"], card["max_model_len"]
        self._check_logprobs_mode()

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, session: str | None = None
    ) -> Generation:
        """Samples one turn after `prompt_ids`; see [`Engine.generate`].

        Raises:
            ValueError: if the server refuses the request, e.g. as longer than its `max_model_len`.
            ConnectionError: if it cannot be reached, or fails.
            TimeoutError: if the turn takes longer than `timeout_seconds`.
        """
        body = json.dumps(self._request(prompt_ids, sampling)).encode()
        with self._lock:
            self._in_flight += 1
        try:
            async with self._gate():
                async with asyncio.timeout(self.timeout_seconds):
                    status, answer = await self._post("/v1/completions", body)
        finally:
            with self._lock:
                self._in_flight -= 1
        _raise_for_status("/v1/completions", status, answer)
        return _generation(json.loads(answer))

    def release(self, session: str) -> None:
        """Nothing to do: the server's prefix cache evicts by use."""

    def refresh(self, model_path: str | None = None) -> None:
        """Has the server load the policy's new weights; see [`VLLMEngine.refresh`]. The folder has to be at the same
        path on the server's machine."""
        with self._lock:
            if self._in_flight:
                raise RuntimeError(
                    f"`refresh` was called while {self._in_flight} requests are being generated, so their turns would "
                    "mix two policies. Await or cancel them first."
                )
        if model_path is None or not Path(model_path).is_dir():
            raise ValueError(
                f"The server would go on with the old weights: `model_path={model_path!r}` is no folder. Pass the "
                "folder of the policy's newest checkpoint."
            )
        folder = str(Path(model_path).resolve())
        previous, self._adapter = self._adapter, None
        if (Path(folder) / "adapter_config.json").exists():
            # A new name each time: no prefix of an earlier policy is taken for this one's.
            adapter = f"policy-{id(self):x}-{next(self._adapters)}"
            self._command("/v1/load_lora_adapter", {"lora_name": adapter, "lora_path": folder})
            self._adapter = adapter
        else:
            self._command("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
            self._command("/reset_prefix_cache", {})
        if previous is not None:
            self._command("/v1/unload_lora_adapter", {"lora_name": previous})

    def sleep(self, level: int = 1) -> None:
        """Frees the server's device while the trainer works; see [`VLLMEngine.sleep`]."""
        self._command(f"/sleep?level={level}", {})

    def wake_up(self) -> None:
        """Takes the device's memory back after [`sleep`]."""
        self._command("/wake_up", {})

    def describe(self) -> dict[str, Any]:
        """Name, version and settings; not the weights, so that a run taken up again finds the engine it had."""
        return {
            "engine": "vllm_server",
            "vllm_version": self._version,
            "model": self._model,
            "max_model_len": self._max_model_len,
        }

    def _request(self, prompt_ids: list[int], sampling: SamplingParams) -> dict[str, Any]:
        return {
            "model": self._adapter or self._model,
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

    def _check_logprobs_mode(self) -> None:
        """With `top_k=1` one token is left, so the distribution drawn from gives it probability 1."""
        request = self._request([0], SamplingParams(1, top_k=1))
        (logp,) = _generation(self._command("/v1/completions", request)).logps
        if logp < -1e-4:
            raise ValueError(
                f"The server reports log-probabilities before temperature and truncation ({logp:.3f} where only one "
                f"token was left), so they are not the behaviour policy's. Start it as `{SERVER_OPTIONS}`."
            )

    def _gate(self) -> asyncio.Semaphore:
        """The bound on connections of the running event loop; semaphores of closed loops are dropped."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if loop not in self._gates:
                self._gates = {other: gate for other, gate in self._gates.items() if not other.is_closed()}
                self._gates[loop] = asyncio.Semaphore(self.max_concurrency)
            return self._gates[loop]

    async def _post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """One request in HTTP/1.0, whose answer simply ends with the connection."""
        url = urlsplit(self.base_url)
        secure = ssl.create_default_context() if url.scheme == "https" else None
        reader, writer = await asyncio.open_connection(
            url.hostname, url.port or (443 if secure else 80), ssl=secure, limit=2**24
        )
        try:
            headers = {"Host": url.netloc, "Content-Length": str(len(body)), **self._headers}
            lines = [f"POST {url.path}{path} HTTP/1.0", *(f"{name}: {value}" for name, value in headers.items())]
            writer.write("\r\n".join([*lines, "", ""]).encode() + body)
            await writer.drain()
            head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if not head.startswith(b"HTTP/"):
            raise ConnectionError(
                f"{self.base_url} closed the connection without an answer. Look at the server's log."
            )
        return int(head.split(maxsplit=2)[1]), answer

    def _command(self, path: str, payload: dict[str, Any] | None) -> Any:
        """A blocking request: GET without a payload, POST with one."""
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.base_url + path, data=body, headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_seconds) as response:
                status, answer = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, answer = error.code, error.read()
        except urllib.error.URLError as error:
            raise ConnectionError(f"No vLLM server answers at {self.base_url} ({error.reason}). Is it up?") from error
        _raise_for_status(path, status, answer)
        try:
            return json.loads(answer)
        except json.JSONDecodeError:  # commands answer with a sentence, or nothing
            return None


def _raise_for_status(path: str, status: int, answer: bytes) -> None:
    if status < 400:
        return
    message = answer.decode(errors="replace")
    if status == 404 and path != "/v1/completions":
        raise ValueError(f"The server does not offer {path.partition('?')[0]}. Start it as `{SERVER_OPTIONS}`.")
    if status < 500:
        raise ValueError(f"The server refused the request to {path} (status {status}): {message}")
    raise ConnectionError(f"The server failed at {path} (status {status}): {message}")


def _generation(answer: dict[str, Any]) -> Generation:
    (choice,) = answer["choices"]
    reason = choice["finish_reason"]
    if reason == "stop" and isinstance(choice["stop_reason"], str):
        reason = "stop_string"
    if reason not in ("stop", "stop_string", "length"):
        raise ConnectionError(f"The server ended the request with {reason!r}, so the turn is not complete.")
    return Generation(choice["token_ids"], choice["logprobs"]["token_logprobs"], reason)
