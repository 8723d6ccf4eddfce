"""No test downloads anything: a name that is not local fails at once instead of waiting for a network."""

from __future__ import annotations

import os


# Read when the libraries are first imported, so set before any test module imports them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
