"""What samples: token ids in, token ids and log-probabilities out. Whoever writes an engine reads `engine` and
`scripted_engine`, and nothing else. Imports nothing of the loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach


if TYPE_CHECKING:
    from .engine import Engine as Engine, Generation as Generation, SamplingParams as SamplingParams
    from .scripted_engine import ScriptedEngine as ScriptedEngine
    from .transformers.engine import TransformersEngine as TransformersEngine
    from .vllm.engine import VLLMEngine as VLLMEngine
    from .vllm.server import VLLMServerEngine as VLLMServerEngine
else:
    __getattr__, __dir__, __all__ = attach(
        __name__,
        {
            ".engine": ["Engine", "Generation", "SamplingParams"],
            ".scripted_engine": ["ScriptedEngine"],
            ".transformers.engine": ["TransformersEngine"],
            ".vllm.engine": ["VLLMEngine"],
            ".vllm.server": ["VLLMServerEngine"],
        },
    )
