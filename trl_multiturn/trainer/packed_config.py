from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


_PACKED: dict[str, Any] = {"auto": "auto", "true": True, "false": False}


@dataclass
class PackedConfig:
    # docstyle-ignore
    """
    Parameters that all multi-turn configurations share: how batches are computed. None of them changes a loss.

    Parameters:
        > Parameters that control how batches are computed

        packed (`bool` or `str`, *optional*, defaults to `"auto"`):
            Whether a batch is computed as one row in which shared prefixes stand once, with the LM head on trained
            tokens only. `"auto"` packs the batches whose shapes say that it pays, on models that pass a self-test at
            the first step, and logs the reason where a model does not. `True` packs every batch and raises where that
            is impossible; `False` computes as TRL does.
        group_by_prompt (`bool`, *optional*, defaults to `False`):
            Whether rows of the same prompt follow each other within the shuffled order, so that there is something to
            share. It changes which rows share an optimizer step.
        max_tokens_per_batch (`int`, *optional*):
            Tokens that one forward pass of training may read: unique ones where batches may be packed (also of a batch
            that then stays padded, as little is shared), padded ones where the model cannot be. A batch of more is
            computed in parts, with the gradient of the whole, for losses that are means over rows; an example of more
            is a part by itself. Evaluation and reference columns, which keep no activations, are not cut.
        max_tokens_per_slice (`int`, *optional*):
            Tokens whose activations are in memory at a time: a longer packed row is computed in slices. By default
            long rows are cut on a CPU, where gradient checkpointing is on; 0 cuts none.
        fused_layers (`bool`, *optional*):
            Whether decoder layers of a packed row are computed from few operators, whose launches a GPU waits for at a
            few thousand tokens. By default they are on a GPU, where the layers are of a known kind (Llama, Mistral,
            Qwen2, Qwen3, without adapters) and a trial computes the same; elsewhere they compute as they came.
    """

    # A string for the command line; `__post_init__` takes both
    packed: str = field(
        default="auto",
        metadata={
            "help": "Whether batches are packed with shared prefixes: 'true', 'false', or 'auto' where their shapes "
            "say that it pays and the model passes a self-test."
        },
    )
    group_by_prompt: bool = field(
        default=False,
        metadata={"help": "Whether rows of the same prompt follow each other within the shuffled order."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens that one forward pass may read (unique ones where batches are packed). A batch of more is "
            "computed in parts, with the gradient of the whole."
        },
    )

    max_tokens_per_slice: int | None = field(
        default=None,
        metadata={
            "help": "Tokens whose activations are in memory at a time: a longer packed row is computed in slices. By "
            "default long rows are cut on a CPU, where gradient checkpointing is on; 0 cuts none."
        },
    )

    fused_layers: bool | None = field(
        default=None,
        metadata={
            "help": "Whether decoder layers of a packed row are computed from few operators, whose launches a GPU "
            "waits for at a few thousand tokens. By default they are on a GPU, where layers are of a known kind (as "
            "Llama, Mistral, Qwen2 or Qwen3, no adapters) and a trial computes the same."
        },
    )

    def __post_init__(self):
        if str(self.packed).lower() not in _PACKED:
            raise ValueError(f"`packed` must be True, False or 'auto', got {self.packed!r}.")
        self.packed = _PACKED[str(self.packed).lower()]
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ValueError(
                f"`max_tokens_per_batch={self.max_tokens_per_batch}` leaves no room for a token. Pass a positive "
                "number, or `None` for no limit."
            )
        if self.max_tokens_per_slice is not None and self.max_tokens_per_slice < 0:
            raise ValueError(
                f"`max_tokens_per_slice={self.max_tokens_per_slice}` is negative. Pass a positive number, 0 to cut no "
                "row, or `None` to leave it to gradient checkpointing."
            )
        super().__post_init__()  # type: ignore[misc]  # that of the TRL configuration beside which it stands
