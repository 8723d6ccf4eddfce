#!/usr/bin/env bash
# A Jupyter kernel publishes no `error` message for an ExceptionGroup, nor for a magic's UsageError: on the channel that
# clients draw their output from, both cells look as if they had succeeded without output. Only the reply to the
# request, on the other channel, has the status `error`. A client that judges a cell by its published messages, as one
# that collects a tool's observation does, takes the failed call for a good one.
#
# Versions: ipykernel 7.4.0, IPython 9.18.1, jupyter_client 8.10.0, Python 3.11. Seen on 2026-11-28:
#   ZeroDivisionError: published ['error'], reply error ZeroDivisionError
#   ExceptionGroup: published ['stream stderr'], reply error ExceptionGroup
#   UsageError: published ['stream stderr'], reply error UsageError
# Exits with 0 while this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q ipykernel==7.4.0 ipython==9.18.1 jupyter_client==8.10.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
from jupyter_client.manager import start_new_kernel

CELLS = {
    "ZeroDivisionError": "1 / 0",
    "ExceptionGroup": "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
    "UsageError": "%no_such_magic",
}
manager, client = start_new_kernel(kernel_name="python3")
seen = {}
for name, code in CELLS.items():
    published = []

    def collect(message):
        kind = message["msg_type"]
        if kind in ("error", "stream"):
            published.append(" ".join([kind, message["content"].get("name", "")]).strip())

    reply = client.execute_interactive(code, output_hook=collect, timeout=60, store_history=False)["content"]
    seen[name] = (sorted(set(published)), reply["status"])
    print(f"{name}: published {sorted(set(published))}, reply {reply['status']} {reply.get('ename')}")
client.stop_channels()
manager.shutdown_kernel(now=True)
assert seen["ZeroDivisionError"] == (["error"], "error"), seen
for name in ("ExceptionGroup", "UsageError"):
    assert "error" not in seen[name][0] and seen[name][1] == "error", seen
PY
