"""HTTP to one vLLM server: pooled, retried where a retry can help, and never with other weights than it was given."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx


SERVER_OPTIONS = (
    "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve … --logprobs-mode processed_logprobs"
)
_CONNECT_SECONDS = 10.0
_FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.1, 8.0
_RETRIED_STATUSES = {408, 425, 429, 500, 502, 503, 504}


class ServerFailed(ConnectionError):
    """The server could not be reached, or failed, or answered what is no answer, for longer than the patience."""


class WrongAnswer(Exception):
    """An answer that is not what was asked for: broken JSON, other fields, impossible values."""


class ServerConnection:
    """
    Requests to one server, from event loops and from plain threads.

    What may pass by itself is tried again with growing waits, for at most `patience_seconds` per request: a connection
    that is refused or reset, the statuses 408, 425, 429 and 5xx, and answers that cannot be read. Other statuses raise
    at once.

    A server that was restarted has the weights that it was started with. Whenever a connection broke, also the idle
    one that is held for this purpose, `restore` is called before the next request, once the server is up again.

    Args:
        base_url (`str`):
            Without `/v1`.
        restore (`Callable`):
            Called on a worker thread after a restart; gives the server back what it had.
        max_connections (`int`):
            Most connections at once, per event loop; more requests wait.
        timeout_seconds (`float`):
            How long one request may take.
        patience_seconds (`float`):
            How long a request is tried again.
        api_key (`str`, *optional*):
            Sent as a bearer token.
    """

    def __init__(
        self,
        base_url: str,
        restore: Callable[[], None],
        max_connections: int,
        timeout_seconds: float,
        patience_seconds: float,
        api_key: str | None = None,
    ) -> None:
        self.base_url = base_url
        self.patience_seconds = patience_seconds
        self.in_flight = 0
        self._restore = restore
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._verify = base_url.startswith("https:")  # else no certificates are loaded
        self._timeout = httpx.Timeout(timeout_seconds, connect=_CONNECT_SECONDS, pool=None)
        self._limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        self._clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        self._guard = threading.Lock()
        self._restoring = threading.Lock()
        self._sentinel: socket.socket | None = None
        self._broken = False
        self._started: float | None = None
        self._restarts = 0

    # Requests

    async def post(self, path: str, payload: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """
        Posts JSON and returns `read(answer)`; `read` raises [`WrongAnswer`] for one that cannot be used.

        Raises:
            `ValueError`: if the server refuses the request.
            `ServerFailed`: if it cannot be reached or fails for longer than the patience.
        """
        with self._guard:
            self.in_flight += 1
        try:
            tries = _Tries(self.base_url, path, self.patience_seconds)
            while True:
                try:
                    await self._whole()
                    restarts = self._restarts
                    response = await self._client().post(path, json=payload)
                    self._refuse_another_process(restarts)
                    return read(_answer(path, response))
                except (httpx.TransportError, _Passing, WrongAnswer) as error:
                    self._broken |= isinstance(error, httpx.TransportError)
                    await asyncio.sleep(tries.next_wait(error))
        finally:
            with self._guard:
                self.in_flight -= 1

    def command(self, path: str, payload: dict[str, Any] | None = None, patience_seconds: float | None = None) -> Any:
        """A blocking request, GET without a payload and POST with one. Returns JSON, or `None` for other answers."""
        tries = _Tries(self.base_url, path, self.patience_seconds if patience_seconds is None else patience_seconds)
        with self._blocking_client() as client:
            while True:
                try:
                    response = client.get(path) if payload is None else client.post(path, json=payload)
                    return _answer(path, response, json_only=False)
                except (httpx.TransportError, _Passing, WrongAnswer) as error:
                    time.sleep(tries.next_wait(error))

    def _blocking_client(self) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, headers=self._headers, timeout=self._timeout, verify=self._verify)

    async def aclose(self) -> None:
        """Closes the connections of the running event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    def _client(self) -> httpx.AsyncClient:
        """The connections of the running event loop; those of closed loops are dropped."""
        loop = asyncio.get_running_loop()
        with self._guard:
            if loop not in self._clients:
                self._clients = {other: held for other, held in self._clients.items() if not other.is_closed()}
                self._clients[loop] = httpx.AsyncClient(
                    base_url=self.base_url,
                    headers=self._headers,
                    timeout=self._timeout,
                    limits=self._limits,
                    verify=self._verify,
                )
            return self._clients[loop]

    # Restarts

    def remember(self) -> None:
        """Called when the server has been given its weights: from now on a restart is noticed."""
        with self._guard:
            self._broken = False
            self._started = self._start_time()
            self._hold()

    async def _whole(self) -> None:
        """Makes sure that the server has what it was given."""
        if not self._broken and not self._sentinel_is_closed():
            return
        await asyncio.to_thread(self._make_whole)

    def _refuse_another_process(self, restarts: int) -> None:
        """An answer whose request was made to the old process, and reached the new one before that had its weights."""
        if restarts != self._restarts or self._sentinel_is_closed():
            raise _Passing("the server was restarted before it answered", None)

    def _make_whole(self) -> None:
        with self._restoring:
            if not self._broken and not self._sentinel_is_closed():
                return  # another request has seen to it
            with self._blocking_client() as client:
                _answer("/health", client.get("/health"), json_only=False)
            started = self._start_time()
            if started is None or started != self._started:
                self._restarts += 1
                self._restore()
            self.remember()

    def _hold(self) -> None:
        """Opens the connection that says nothing: its end is how an idle server's end is noticed."""
        if self._sentinel is not None:
            self._sentinel.close()
        self._sentinel = None
        url = httpx.URL(self.base_url)
        try:
            port = url.port or (443 if url.scheme == "https" else 80)
            self._sentinel = socket.create_connection((url.host, port), _CONNECT_SECONDS)
            self._sentinel.setblocking(False)
        except OSError:
            self._broken = True

    def _sentinel_is_closed(self) -> bool:
        if self._sentinel is None:
            return False
        try:
            return self._sentinel.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _start_time(self) -> float | None:
        """When the server's process started, where its metrics tell; `None` where they do not."""
        try:
            with self._blocking_client() as client:
                lines = client.get("/metrics").text.splitlines()
        except httpx.HTTPError:
            return None
        values = [line.split()[-1] for line in lines if line.startswith("process_start_time_seconds ")]
        return float(values[0]) if values else None


class _Passing(Exception):
    """A status that may be another one soon; `wait` is what the server asks for, in seconds."""

    def __init__(self, message: str, wait: float | None) -> None:
        super().__init__(message)
        self.wait = wait


class _Tries:
    """How long to wait before the next try, or the error that ends them."""

    def __init__(self, base_url: str, path: str, patience_seconds: float) -> None:
        self.base_url, self.path = base_url, path
        self.patience = patience_seconds
        self.begin = time.monotonic()
        self.wait = _FIRST_WAIT_SECONDS

    def next_wait(self, error: Exception) -> float:
        wait = self.wait * random.uniform(0.75, 1.25)
        wait = max(wait, getattr(error, "wait", None) or 0.0)
        self.wait = min(2 * self.wait, _LONGEST_WAIT_SECONDS)
        spent = time.monotonic() - self.begin
        if spent + wait > self.patience:
            what = f"{type(error).__name__}: {error}" if isinstance(error, httpx.TransportError) else str(error)
            if isinstance(error, httpx.ConnectError):
                raise ServerFailed(f"No vLLM server answers at {self.base_url} ({error}). Is it up?") from error
            raise ServerFailed(
                f"The vLLM server at {self.base_url} failed at {self.path} for {spent:.0f} s ({what}). Look at its "
                "log; `patience_seconds` says how long it may be away."
            ) from error
        return wait


def _answer(path: str, response: httpx.Response, json_only: bool = True) -> Any:
    """The JSON of a response, or what its status means."""
    status, message = response.status_code, response.text[:2000]
    if status in _RETRIED_STATUSES:
        raise _Passing(f"status {status}: {message}", _retry_after(response))
    if status == 404 and path != "/v1/completions":
        raise ValueError(f"The server does not offer {path.partition('?')[0]}. Start it as `{SERVER_OPTIONS}`.")
    if status >= 400:
        raise ValueError(f"The server refused the request to {path} (status {status}): {message}")
    try:
        return response.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if json_only:
            raise WrongAnswer(f"an answer that is no JSON: {message[:200]!r}") from error
        return None  # commands answer with a sentence, or nothing


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return float(response.headers["Retry-After"])
    except (KeyError, ValueError):
        return None
