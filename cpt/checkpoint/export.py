"""A native checkpoint as a Hugging Face folder: one process, no Megatron, one file's worth of tensors in memory."""

from __future__ import annotations

import os
from pathlib import Path

from cpt.checkpoint import hf, manifest, native


def to_hf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Write `out` from an `iter_*` folder.

    Args:
        dtype: auto | fp32 | bf16 | fp16, see `hf.write`.
        tokenizer: folder or `tokenizer.json` whose files go along.

    Raises:
        UsageError: the checkpoint is not whole, or `out` exists.
    """
    model = manifest.read(checkpoint).model
    return hf.write(native.tensors(checkpoint), model, out, dtype=dtype, tokenizer=tokenizer)
