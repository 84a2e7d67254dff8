"""A native checkpoint as a Hugging Face folder, by the converter: one process, no Megatron, blocks in memory."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from cpt.base.errors import EnvironmentProblem, StageFailed, UsageError
from cpt.checkpoint import hf_config, manifest
from cpt.checkpoint.formats import Output, Reading, Writing
from cpt.checkpoint.formats.hf import taken_along
from cpt.checkpoint.writing import FileSums

FILE_BYTES = 5 * 10**9
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SETTINGS = "tokenizer_config.json"


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
        checkpoint: an `iter_*` folder.
        dtype: auto (that of the base, or float32) | fp32 | bf16 | fp16, or as torch spells it.
        tokenizer: folder or `tokenizer.json` whose files go along.
        file_bytes: size at which another file is begun [bytes].

    Raises:
        UsageError: the checkpoint is not whole, or `out` exists.
        StageFailed: the disk has no room. What is finished is kept for the next attempt.
    """
    from cpt.checkpoint.job.convert import convert
    from cpt.checkpoint.job.planning import Request, Running, plan

    out = Path(out)
    if out.exists():
        raise UsageError(f"`{out}` exists already")
    if dtype == "auto":
        dtype = hf_config.source_dtype(manifest.read(checkpoint).model)
    writing = Writing(dtype=_DTYPES.get(dtype, dtype), optimizer="none", file_bytes=file_bytes)
    made = plan(Request(source=Path(checkpoint), out=out, to="hf", reading=Reading(optimizer=False), writing=writing))
    if tokenizer is not None:
        made = dataclasses.replace(made, output=_with_tokenizer(made.output, Path(tokenizer)))
    try:
        convert(made, Running())
    except EnvironmentProblem as error:
        hint = "the checkpoint it is made from is untouched; make space, and the same command goes on"
        raise StageFailed(error.message, *(error.hints or (hint,))) from error
    return out


def _with_tokenizer(output: Output, source: Path) -> Output:
    """The folder with a tokenizer's files; a bare `tokenizer.json` gets the settings that `AutoTokenizer` asks for."""
    origin = source if source.is_dir() else source.parent
    if not (origin / "tokenizer.json").is_file() and not source.is_file():
        raise UsageError(f"there is no `tokenizer.json` in `{origin}`")
    copies = {name: path for name, path in taken_along(origin).items() if name != "config.json"}
    if source.is_file():
        copies["tokenizer.json"] = source
    if _SETTINGS in copies:
        try:
            json.loads(copies[_SETTINGS].read_text(encoding="utf-8"))
        except ValueError:
            raise UsageError(f"`{copies[_SETTINGS]}` is not JSON") from None
        return dataclasses.replace(output, copies={**output.copies, **copies})

    def finish(sums: Mapping[str, FileSums]) -> dict[str, bytes]:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {_SETTINGS: (json.dumps(settings, indent=2) + "\n").encode(), **output.finish(sums)}

    return dataclasses.replace(output, copies={**output.copies, **copies}, finish=finish)
