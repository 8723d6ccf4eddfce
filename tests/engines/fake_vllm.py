"""A vLLM server's interface with faults on request: what is tested is the client, so the tokens are made up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FakeServer:
    """
    Answers on a port of its own until `stop`; `start` begins a new process, so to speak, with its first weights.

    Args:
        port (`int`, *optional*): a free one by default.

    Attributes:
        faults (`list[Callable]`): each is called once, with the handler, instead of the next completion.
        requests (`list[dict]`): completions that arrived, with the weights that answered them.
    """

    def __init__(self, port: int = 0) -> None:
        self.faults: list[Callable[[Handler], None]] = []
        self.requests: list[dict[str, Any]] = []
        self.loads: list[str] = []
        self.seconds = 0.0  # that a completion takes
        self.at_once = self.most_at_once = 0
        self.port = port
        self.guard = threading.Lock()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.weights, self.adapters = "first", set[str]()
        self.started = time.time()
        self.connections: list[Any] = []
        server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Bound", (Handler,), {"fake": self}))
        server.daemon_threads = True
        server.block_on_close = False
        self.port = server.server_address[1]
        self.server = server
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Ends as a killed process does: the port is closed and all its connections."""
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:
            try:
                connection.shutdown(2)
            except OSError:
                pass
            connection.close()

    def restart(self) -> None:
        self.stop()
        self.start()


class Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.fake.connections.append(self.connection)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(200, f"process_start_time_seconds {self.fake.started}\n".encode())
        elif self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "base", "max_model_len": 64}]})
        else:
            self.answer(200, {"version": "0.32.0"})

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        fake = self.fake
        if self.path == "/v1/completions":
            self.complete(payload)
            return
        if self.path == "/collective_rpc":
            fake.weights = Path(payload["kwargs"]["weights_path"]).name
            fake.loads.append(fake.weights)
        elif self.path == "/v1/load_lora_adapter":
            fake.adapters.add(payload["lora_name"])
            fake.loads.append(payload["lora_name"])
        elif self.path == "/v1/unload_lora_adapter":
            fake.adapters.discard(payload["lora_name"])
        self.answer(200, b"Success")

    def complete(self, payload: dict[str, Any]) -> None:
        fake = self.fake
        if fake.faults and payload["top_k"] != 1:  # not at the check of the log-probabilities' mode
            fake.faults.pop(0)(self)
            return
        if payload["model"] not in {"base", *fake.adapters}:
            self.answer(404, {"error": f"The model {payload['model']} does not exist."})
            return
        if len(payload["prompt"]) > 64:
            self.answer(400, {"error": f"{len(payload['prompt'])} tokens are more than 64"})
            return
        with fake.guard:
            fake.at_once += 1
            fake.most_at_once = max(fake.most_at_once, fake.at_once)
            weights = fake.weights if payload["model"] == "base" else payload["model"]
            fake.requests.append({**payload, "weights": weights})
        time.sleep(fake.seconds)
        with fake.guard:
            fake.at_once -= 1
        self.answer(200, completion([1, 2, 3][: payload["max_tokens"]]))


def completion(token_ids: list[Any], logps: list[Any] | None = None, **choice: Any) -> dict[str, Any]:
    """An answer of vLLM's completions."""
    logps = [0.0] * len(token_ids) if logps is None else logps
    return {
        "choices": [
            {
                "token_ids": token_ids,
                "logprobs": {"token_logprobs": logps},
                "finish_reason": "length",
                "stop_reason": None,
                **choice,
            }
        ]
    }
