from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class RenderingConfig:
    # docstyle-ignore
    """
    Parameters that all multi-turn configurations share: what of a row's messages is rendered.

    Parameters:
        > Parameters that control what is rendered

        drop_reasoning (`bool`, *optional*, defaults to `False`):
            Whether the reasoning of assistant turns (`reasoning_content`, `reasoning`, `thinking`) is left out of what
            is rendered and trained. Without it, a row whose reasoning the chat template does not show is refused.
        training_template (`bool`, *optional*, defaults to `False`):
            Where the chat template rewrites earlier turns (it strips their thinking), whether rows are rendered with
            TRL's training template of its family, if there is one. By default a row is the token sequences that the
            policy saw, one for each time that its history was rewritten.
        tool_dialect (`str`, *optional*):
            Calls, results and tools as text, for chat templates that show none: `"hermes"` (JSON in tags, the tools
            described in the system message) or `"fenced"` (a code block). Rows are then what rollouts with
            `RolloutConfig(dialect=…)` read and sample. By default calls are the chat template's own, and a row whose
            calls it does not show is refused.
        write_reasoning (`bool`, *optional*, defaults to `False`):
            Whether reasoning is written as `<think>…</think>` before the words of its turn, where the chat template
            can show none under any of its switches. Without it such rows are refused.
    """

    drop_reasoning: bool = field(
        default=False,
        metadata={
            "help": "Whether the reasoning of assistant turns is left out of what is rendered and trained. Without "
            "it, rows whose reasoning the chat template does not show are refused."
        },
    )
    training_template: bool = field(
        default=False,
        metadata={
            "help": "Where the chat template rewrites earlier turns, whether rows are rendered with TRL's training "
            "template of its family. By default a row is the token sequences that the policy saw."
        },
    )
    tool_dialect: str | None = field(
        default=None,
        metadata={
            "help": "Calls, results and tools as text, for chat templates that show none: `hermes` (JSON in tags) or "
            "`fenced` (a code block), as rollouts in this dialect read and sample them."
        },
    )
    write_reasoning: bool = field(
        default=False,
        metadata={
            "help": "Whether reasoning is written as `<think>…</think>` before the words of its turn, where the chat "
            "template can show none. Without it, such rows are refused."
        },
    )
