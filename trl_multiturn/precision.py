"""What matrix products are computed in."""

from __future__ import annotations

import torch


def matmul_uses_tf32() -> bool:
    """
    Whether float32 matrix products on CUDA are rounded to TF32.

    PyTorch 2.9 has a new name for the setting, which Transformers sets (`TrainingArguments(tf32=True)`); reading the
    old one then raises.
    """
    matmul = torch.backends.cuda.matmul
    try:
        precision = matmul.fp32_precision
    except AttributeError:
        return matmul.allow_tf32
    return precision == "tf32"
