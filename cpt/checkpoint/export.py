"""A checkpoint of a run as a Hugging Face folder, by the converter: one process, no Megatron, blocks in memory."""

from __future__ import annotations

import os
from pathlib import Path

from cpt.base.errors import EnvironmentProblem, UsageError
from cpt.checkpoint import hf_config, manifest, tokenizer_files
from cpt.checkpoint.formats import Reading, Writing

FILE_BYTES = 5 * 10**9
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def to_hf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load. It appears whole or not at all.

    Args:
        checkpoint: an `iter_*` folder, or a Hugging Face folder.
        dtype: fp32 | bf16 | fp16, or as torch spells it; auto: of an `iter_*` folder that of the base or float32, else
            as it is.
        tokenizer: folder or `tokenizer.json` whose files go along.
        file_bytes: size at which another file is begun [bytes].

    Raises:
        UsageError: the checkpoint is not whole, or `out` exists.
        EnvironmentProblem: the disk has no room. What is finished is kept for the next attempt.
    """
    from cpt.checkpoint.job.convert import convert
    from cpt.checkpoint.job.planning import Request, Running, plan

    out = Path(out)
    if out.exists():
        raise UsageError(f"`{out}` exists already")
    wanted: str | None = _DTYPES.get(dtype, dtype)
    if dtype == "auto":
        is_native = (Path(checkpoint) / manifest.NAME).is_file()
        wanted = hf_config.source_dtype(manifest.read(checkpoint).model) if is_native else None
    writing = Writing(dtype=wanted, optimizer="none", file_bytes=file_bytes)
    beside = tokenizer_files.named(Path(tokenizer)) if tokenizer is not None else {}
    request = Request(
        source=Path(checkpoint), out=out, to="hf", reading=Reading(optimizer=False), writing=writing, files=beside
    )
    try:
        convert(plan(request), Running())
    except EnvironmentProblem as error:
        hint = "the checkpoint it is made from is untouched; make space, and the same command goes on"
        raise EnvironmentProblem(error.message, *(error.hints or (hint,))) from error
    return out
