"""Hugging Face folders: read into an engine under any layout, and written so that `AutoModelForCausalLM` loads them.

Reading is lazy: each rank reads its own rows and columns of each tensor and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import UsageError
from cpt.base.files import fsync_folder, write_json
from cpt.checkpoint import mapping
from cpt.checkpoint.arrays import Tensor, crop
from cpt.checkpoint.formats.hf import TOKENIZER_FILES
from cpt.checkpoint.hf_config import config_for, parse, read_config, source_dtype, write_config
from cpt.checkpoint.safetensors_files import INDEX, Place, read_headers
from cpt.plan.types import ModelConfig

if TYPE_CHECKING:
    import torch

    from cpt.engine.ports import Engine

__all__ = ["config_for", "load", "parse", "read_config", "source_dtype", "write", "write_config"]

_FLOATS = ("F32", "BF16", "F16", "F64")
SHARD_BYTES = 5 * 10**9


def load(engine: Engine, folder: str | os.PathLike[str]) -> None:
    """Put a Hugging Face folder's weights into the engine's model, and into the optimizer's main weights.

    Every rank calls it and reads its own part. Values are converted to the model's dtype; padding rows of the
    vocabulary become 0.

    Raises:
        UsageError: a tensor is missing, unknown, or of another shape than the engine's configuration says.
    """
    from safetensors import SafetensorError

    from cpt.engine import megatron, weights

    places = read_headers(folder)
    check(places, engine.model)
    fused = mapping.megatron_tensors(engine.model)
    try:
        with _Files(places) as files:
            _check_tied(files, places, engine.model)
            for weight in weights.walk(engine):
                _fill(weight, fused[weight.name].tensor, files)
    except SafetensorError as error:
        raise UsageError(f"`{folder}` cannot be read: {error}") from None
    megatron.refresh_main_weights(engine)


def check(places: Mapping[str, Place], model: ModelConfig) -> None:
    """Compare a folder's tensors with what the model needs.

    Raises:
        UsageError: all differences together.
    """
    wanted = {name: tensor.shape for name, tensor in mapping.hf_tensors(model).items()}
    problems = []
    for name, shape in wanted.items():
        if name not in places:
            problems.append(f"tensor `{name}` is missing{mapping.suggest(name, places)}")
        elif places[name].shape != shape:
            problems.append(
                f"tensor `{name}` has shape {list(places[name].shape)}, the configuration says {list(shape)}"
            )
        elif places[name].dtype not in _FLOATS:
            problems.append(f"tensor `{name}` has dtype `{places[name].dtype}`, wanted F32, BF16 or F16")
    copy, _ = mapping.tied_copy(model) or (None, None)
    for name in places:
        if name not in wanted and name != copy and not mapping.IGNORED.fullmatch(name):
            problems.append(f"no rule says what tensor `{name}` is{mapping.suggest(name, wanted)}")
    if problems:
        shown = [UsageError(p) for p in problems[1:10]]
        if len(problems) > 10:
            shown.append(UsageError(f"and {len(problems) - 10} more tensors that do not fit"))
        raise UsageError(problems[0], more=tuple(shown))


class _Files:
    """The folder's files, opened once each."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places
        self.open: dict[Path, Any] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        self.open.clear()

    def slice(self, name: str) -> Any:
        """A tensor that is read when it is indexed."""
        from safetensors import safe_open

        file = self.places[name].file
        if file not in self.open:
            self.open[file] = safe_open(file, framework="pt", device="cpu")
        return self.open[file].get_slice(name)


def _fill(weight: Any, whole: Tensor, files: _Files) -> None:
    """Read this rank's rows and columns of a tensor into its parameter."""
    import torch

    left, right = weight.columns or (0, whole.matrix[1])
    with torch.no_grad():
        at = 0
        for start, stop in weight.rows:
            weight.param[at : at + stop - start].zero_()
            for f in crop(whole.fills, start, stop - start, left, right - left):
                source = files.slice(str(f.atom))
                rows = slice(f.at_row, f.at_row + f.rows)
                part = source[rows] if weight.columns is None else source[rows, left:right]
                weight.param[at + f.row : at + f.row + f.rows].copy_(part)
            at += stop - start


def _check_tied(files: _Files, places: Mapping[str, Place], model: ModelConfig) -> None:
    """A tied model's file may hold the output layer again; then it must be the embedding, bit for bit."""
    import torch

    tied = mapping.tied_copy(model)
    if tied is None or tied[0] not in places:
        return
    copy, embedding = tied
    rows = max(1, 2**24 // max(1, model.hidden_size))
    for start in range(0, model.vocab_size, rows):
        a, b = files.slice(copy)[start : start + rows], files.slice(embedding)[start : start + rows]
        if a.shape != b.shape or not torch.equal(a, b):
            raise UsageError(
                f"`tie_word_embeddings` is true, but `{copy}` differs from `{embedding}`",
                "set `tie_word_embeddings` to false in `config.json` if both are meant",
            )


def split(model: ModelConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face tensors out of Megatron's, each as soon as it is complete.

    Args:
        tensors: whole tensors by Megatron name, stacked over layers or one key a layer; padding rows are cut off.

    Raises:
        UsageError: a tensor is unknown or of a wrong shape, or some are missing at the end.
    """
    import torch

    known, shapes = mapping.megatron_tensors(model), mapping.atom_shapes(model)
    left = {name: shape[0] for name, shape in shapes.items()}
    partial: dict[str, torch.Tensor] = {}
    for stacked, whole in tensors:
        keys = _layers(stacked, model.num_layers)
        for i, key in enumerate(keys):
            tensor = whole if keys == [stacked] else whole[i]
            if key not in known:
                raise UsageError(f"no rule says what tensor `{key}` is{mapping.suggest(key, known)}")
            wanted = known[key].tensor
            if tuple(tensor.shape[1:]) != wanted.shape[1:] or tensor.shape[0] < wanted.shape[0]:
                raise UsageError(
                    f"tensor `{key}` has shape {list(tensor.shape)}, the configuration says {list(wanted.shape)}"
                )
            for f in wanted.fills:
                assert f.atom is not None and not f.transposed
                part = tensor[f.row : f.row + f.rows]
                if f.rows == shapes[f.atom][0]:
                    left[f.atom] = 0
                    yield f.atom, part.contiguous()
                    continue
                if f.atom not in partial:
                    partial[f.atom] = torch.empty(shapes[f.atom], dtype=tensor.dtype)
                partial[f.atom][f.at_row : f.at_row + f.rows] = part
                left[f.atom] -= f.rows
                if left[f.atom] == 0:
                    yield f.atom, partial.pop(f.atom)
    missing = [name for name, rows in left.items() if rows]
    if missing:
        raise UsageError(f"{len(missing)} tensors are missing, the first is `{missing[0]}`")


def _layers(key: str, num_layers: int) -> list[str]:
    """Names with one key a layer that a checkpoint's name stands for: itself, or all layers of a stacked one."""
    if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit():
        rest = key.removeprefix("decoder.layers.")
        return [f"decoder.layers.{i}.{rest}" for i in range(num_layers)]
    return [key]


def write(
    tensors: Iterable[tuple[str, torch.Tensor]],
    model: ModelConfig,
    out: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    tokenizer: str | os.PathLike[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load. It appears whole or not at all.

    Args:
        tensors: whole Megatron tensors, see `split`. At most one file's worth is in memory.
        dtype: auto (that of the base, or float32) | fp32 | bf16 | fp16, or as torch spells it.
        tokenizer: folder or `tokenizer.json` whose files go along.
        shard_bytes: size at which another file is begun [bytes].

    Raises:
        UsageError: `out` exists, or the tensors do not make up the model.
    """
    import torch

    out = Path(out)
    if out.exists():
        raise UsageError(f"`{out}` exists already")
    names = {"auto": source_dtype(model), "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    spelled = names.get(dtype, dtype)
    kind = getattr(torch, spelled)
    half_done = out.with_name(f".{out.name}.partial")
    shutil.rmtree(half_done, ignore_errors=True)
    half_done.mkdir(parents=True)
    try:
        _write_shards(half_done, ((n, _converted(n, t, kind)) for n, t in split(model, tensors)), shard_bytes)
        config = write_config(model, spelled)
        if tokenizer is not None:
            _copy_tokenizer(Path(tokenizer), half_done)
        write_json(half_done / "config.json", config)
        fsync_folder(half_done)
        os.rename(half_done, out)
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(half_done, ignore_errors=True)
    return out


def _converted(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = tensor.detach().to(device="cpu", dtype=dtype)
    if str(dtype) == "torch.float16" and not converted.isfinite().all() and tensor.isfinite().all():
        raise UsageError(f"tensor `{name}` has values too large for fp16", "write bf16 or fp32")
    # A view would drag the whole stacked tensor along.
    return converted.clone() if converted.untyped_storage().nbytes() != converted.nbytes else converted


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> None:
    """Write tensors to files of about `shard_bytes` and, when there are several, their index."""
    from safetensors.torch import save_file

    where: dict[str, int] = {}
    held: dict[str, torch.Tensor] = {}
    files: list[Path] = []
    size = total = 0

    def flush() -> None:
        file = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(held, file, metadata={"format": "pt"})
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
        files.append(file)
        where.update(dict.fromkeys(held, len(files)))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    weight_map = {name: names[number - 1] for name, number in sorted(where.items())}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files; a bare `tokenizer.json` gets the settings that `AutoTokenizer` asks for."""
    origin = source if source.is_dir() else source.parent
    if not (origin / "tokenizer.json").is_file() and not source.is_file():
        raise UsageError(f"there is no `tokenizer.json` in `{origin}`")
    for name in TOKENIZER_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    if source.is_file() and source.name != "tokenizer.json":
        shutil.copyfile(source, folder / "tokenizer.json")
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        write_json(settings, {"tokenizer_class": "PreTrainedTokenizerFast"})
    try:
        json.loads(settings.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"`{origin / settings.name}` is not JSON") from None
