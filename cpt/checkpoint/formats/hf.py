"""Hugging Face folders: `config.json` and safetensors, one file or several with an index. Older `pytorch_model.bin` is
read (as data, never as code), not written."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from cpt.base.errors import UsageError
from cpt.base.files import read_json
from cpt.checkpoint import hf_config, mapping, megatron_args, tokenizer_files, torch_zip, unpickle
from cpt.checkpoint.arrays import CARRIERS, Array, Files, Fill, OutFile, Payload, Place, Tensor, as_matrix, payload
from cpt.checkpoint.content import MAIN, MODEL, Atom, Content
from cpt.checkpoint.formats import FORMATS, Output, Reading, WritableFormat, Writing
from cpt.checkpoint.safetensors_files import INDEX, has_weights, named_in, read_headers
from cpt.checkpoint.tokenizer_files import PLAIN_SETTINGS, SETTINGS, TOKENIZER
from cpt.checkpoint.writing import FileSums
from cpt.plan.model import ModelConfig

DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "U8": "uint8",
    "BOOL": "bool",
}
SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_FLOATS = ("float32", "bfloat16", "float16", "float64")
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_MOST_SHOWN = 10
_BLOCK = 16 << 20  # [bytes]


@dataclass(frozen=True)
class Found:
    """A tensor of a folder's files.

    Args:
        start: of its first value [bytes from the start of the file].
        strides: of rows and columns of the matrix that it is, see `as_matrix` [values].
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, int]


@FORMATS.add("hf")
class HuggingFace(WritableFormat):
    name: ClassVar[str] = "hf"
    title: ClassVar[str] = "Hugging Face format"
    keeps_optimizer: ClassVar[bool] = False

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        return (folder / "config.json").is_file()

    @classmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        model = hf_config.read_config(reading.config or folder)
        if reading.config is not None and (own := _own_family(folder)) not in (None, model.family):
            raise UsageError(
                f"`{reading.config}` is of a `{model.family}` model, and `{folder / 'config.json'}` of a `{own}` model",
                "leave `--config` out: the folder says what it is",
            )
        if reading.vocab_size not in (None, model.vocab_size):
            raise UsageError(f"`--vocab-size` is {reading.vocab_size}, `config.json` says {model.vocab_size}")
        return opened(folder, model, untie=reading.untie)

    @classmethod
    def why_not_whole(cls, folder: Path) -> str | None:
        try:
            if has_weights(folder):
                read_headers(folder)
            elif not _is_pickled(folder):
                return "it holds no weights"
            elif (folder / BIN_INDEX).is_file():
                names = sorted(set(named_in(folder / BIN_INDEX).values()))
                return next(
                    (f"`{n}` is missing: `{BIN_INDEX}` names it" for n in names if not (folder / n).is_file()), None
                )
        except UsageError as error:
            return error.message.replace(f"`{folder}/", "`")
        return None

    @classmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        model = content.model
        if content.args is not None and not writing.keep_padding:
            _check_vocabulary(content.args, model, content.path)
        tensors = mapping.hf_tensors(model)
        if writing.keep_padding and (padded := content.padded_vocab_size or 0) > model.vocab_size:
            tensors = {name: _padded(t, model, padded, content.atoms[name].pad_rows) for name, t in tensors.items()}
            model = replace(model, vocab_size=padded)
        state, dtypes = MODEL, writing.weight_dtypes(content)
        if writing.from_master:
            without = [n for n in tensors if MAIN not in content.atoms[n].states]
            if without:
                raise UsageError(
                    f"`{content.path}` has no main weights of the optimizer for `{without[0]}`",
                    "leave `--from-master` out: the model's weights are written",
                )
            state, dtypes = MAIN, dict.fromkeys(tensors, writing.dtype or "float32")
        payloads = [payload(t, state, dtypes[name]) for name, t in tensors.items()]
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        groups = grouped(payloads, writing.file_bytes)
        names = file_names(len(groups))
        files = tuple(safetensors(name, group, shapes) for name, group in zip(names, groups, strict=True))
        values: Counter[str] = Counter()
        for p in payloads:
            values[p.dtype] += p.nbytes
        config = _config(content, hf_config.write_config(model, values.most_common(1)[0][0]))

        def finish(sums: Mapping[str, FileSums]) -> dict[str, bytes]:
            made = {}
            if len(names) > 1:
                where = {p.name: name for name, group in zip(names, groups, strict=True) for p in group}
                total = sum(p.nbytes for p in payloads)
                made[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
            if TOKENIZER in copies and SETTINGS not in copies:
                made[SETTINGS] = PLAIN_SETTINGS
            return made | {"config.json": config}

        copies = {name: path for name, path in content.files.items() if name != "config.json"}
        return Output(files=files, finish=finish, copies=copies, dropped=tuple(_dropped(content, writing)))


def _own_family(folder: Path) -> str | None:
    """The family that a folder's own `config.json` names, where it can be read."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def opened(folder: Path, model: ModelConfig, *, untie: bool = False) -> Content:
    """What a folder holds of a model; no values are read, but for a tied output layer that is there again.

    Raises:
        UsageError: its files are damaged, or do not hold exactly this model's tensors.
    """
    found, crc32 = _stored(folder)
    found = _with_prefix(found, model)
    if untie:
        tied = mapping.tied_copy(model)
        if tied is None or tied[0] not in found:
            why = "its output layer is not tied" if tied is None else f"it has no `{tied[0]}`"
            raise UsageError(f"`{folder}` has nothing to untie: {why}", "leave `--untie` out")
        model = replace(model, tie_embeddings=False)
    _check(found, model)
    _check_tied(found, model)
    shapes = mapping.atom_shapes(model)
    atoms = {}
    for name, tensor in mapping.hf_tensors(model).items():
        dtype = found[name].dtype
        array = Array(dtype, shapes[name], (_place(found[name], shapes[name], tensor.fills[0].transposed),))
        atoms[name] = Atom(name=name, shape=shapes[name], dtype=dtype, states={MODEL: array})
    return Content(
        format=HuggingFace.name,
        path=folder,
        model=model,
        atoms=atoms,
        files={"config.json": folder / "config.json", **tokenizer_files.in_folder(folder)},
        left_out=tuple(_left_out(found, model)),
        crc32=crc32,
    )


def _stored(folder: Path) -> tuple[dict[str, Found], dict[str, tuple[tuple[int, int, int], ...]]]:
    """Every tensor of the folder by name, and the checksums that its files carry."""
    if not has_weights(folder) and _is_pickled(folder):
        return _pickled(folder)
    found = {}
    for name, place in read_headers(folder).items():
        dtype = DTYPES.get(place.dtype, place.dtype)
        _, columns = as_matrix(place.shape)
        found[name] = Found(place.file, dtype, place.shape, place.start, (columns, 1))
        if dtype in CARRIERS and place.nbytes != math.prod(place.shape) * CARRIERS[dtype].itemsize:
            raise UsageError(
                f"`{place.file}`: `{name}` has {place.nbytes:,} bytes, "
                f"which is not {list(place.shape)} of {place.dtype}"
            )
    return found, {}


def _is_pickled(folder: Path) -> bool:
    return (folder / BIN).is_file() or (folder / BIN_INDEX).is_file()


def _pickled(folder: Path) -> tuple[dict[str, Found], dict[str, tuple[tuple[int, int, int], ...]]]:
    """The same of `pytorch_model.bin`, or of several of them with an index."""
    index = folder / BIN_INDEX
    claimed = named_in(index) if index.is_file() else {}
    found: dict[str, Found] = {}
    crc32: dict[str, tuple[tuple[int, int, int], ...]] = {}
    files = Files()
    for path in [folder / name for name in sorted(set(claimed.values()))] or [folder / BIN]:
        data = files.map(str(path))
        archive = torch_zip.read(data, 0, len(data), path)
        if not isinstance(archive.value, Mapping):
            raise UsageError(f"`{path}` holds no tensors by name")
        for name, record in archive.value.items():
            if not isinstance(record, unpickle.TensorRecord):
                raise UsageError(f"`{path}`: `{name}` is not a tensor")
            if name in found:
                raise UsageError(f"tensor `{name}` is both in `{found[name].file}` and in `{path}`")
            found[name] = _record(path, str(name), record, archive)
        crc32[str(path)] = tuple((s.start, s.length, s.crc32) for s in archive.storages.values())
    for name, file_name in claimed.items():
        if name not in found or found[name].file.name != file_name:
            raise UsageError(f"`{index}` says that `{name}` is in `{file_name}`, but it is not there")
    return found, crc32


def _record(path: Path, name: str, record: unpickle.TensorRecord, archive: torch_zip.Archive) -> Found:
    dtype, storage = record.storage.dtype, archive.storages.get(record.storage.key)
    if storage is None:
        raise UsageError(f"`{path}`: the values of `{name}` are missing")
    size = CARRIERS[dtype].itemsize if dtype in CARRIERS else 1
    shape, stride = record.size, record.stride
    last = record.offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if 0 not in shape else 0
    if record.offset < 0 or min(stride, default=0) < 0 or last * size > storage.length:
        raise UsageError(f"`{path}`: `{name}` needs {last * size:,} bytes, {storage.length:,} are there")
    rows, columns = as_matrix(shape)
    inner = list(stride[1:])
    expected = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
    if len(shape) > 2 and inner != expected and math.prod(shape) > 0:
        raise UsageError(f"`{path}`: the values of `{name}` do not lie in order")
    strides = (stride[0] if shape else 1, inner[0] if len(shape) == 2 else 1)
    if 1 not in strides and rows > 1 and columns > 1:
        raise UsageError(f"`{path}`: the values of `{name}` do not lie in order")
    return Found(path, dtype, shape, storage.start + record.offset * size, strides)


def _place(found: Found, shape: tuple[int, ...], transposed: bool) -> Place:
    """Where a logical tensor [out, in] of this shape lies."""
    rows, columns = as_matrix(shape)
    size = CARRIERS[found.dtype].itemsize
    down, across = found.strides
    if across == 1 or as_matrix(found.shape)[1] == 1:
        return Place(str(found.file), found.start, down * size, 0, rows, 0, columns, transposed)
    # Columns lie one after another: the file holds the other orientation.
    return Place(str(found.file), found.start, across * size, 0, rows, 0, columns, not transposed)


def _with_prefix(found: dict[str, Found], model: ModelConfig) -> dict[str, Found]:
    """Tensors under the names of the whole model; older files of a model without its head lack the first part."""
    wanted = mapping.hf_tensors(model)
    prefix = next(iter(wanted)).split(".")[0] + "."
    if any(name.startswith(prefix) for name in found):
        return found
    known = {name.removeprefix(prefix): name for name in wanted if name.startswith(prefix)}
    return {known.get(name, name): place for name, place in found.items()}


def _layers(names: Iterable[str]) -> int:
    """Into how many layers the tensors of a model are counted by their names."""
    return max((int(m[1]) + 1 for name in names if (m := re.search(r"\.(\d+)\.", name))), default=0)


def _check(found: Mapping[str, Found], model: ModelConfig) -> None:
    """Compare a folder's tensors with what the model needs.

    Raises:
        UsageError: all differences together.
    """
    wanted = mapping.hf_tensors(model)
    problems = []
    layers, there = _layers(wanted), _layers(found)
    if layers != there and there:
        raise UsageError(f"`config.json` says {layers} layers, its tensors are of {there} (`num_hidden_layers`)")
    copy, _ = mapping.tied_copy(model) or (None, None)
    for name, tensor in wanted.items():
        if name not in found:
            tied = "; a head that is the embedding is `tie_word_embeddings: true` in `config.json`"
            is_head = name in ("lm_head.weight", "embed_out.weight")
            problems.append(f"tensor `{name}` is missing{tied if is_head else mapping.suggest(name, found)}")
            continue
        it = found[name]
        if it.shape != tensor.shape:
            problems.append(
                f"`{it.file}`: `{name}` has shape {list(it.shape)}, `config.json` says {list(tensor.shape)}"
            )
        elif it.dtype not in _FLOATS:
            problems.append(
                f"`{it.file}`: `{name}` has dtype `{it.dtype}`, which is not converted "
                f"(wanted: {', '.join(_FLOATS)}; quantised weights must be restored first)"
            )
    for name in found:
        if name not in wanted and name != copy and not mapping.IGNORED.fullmatch(name):
            problems.append(f"`{found[name].file}`: no rule says what `{name}` is{mapping.suggest(name, wanted)}")
    if problems:
        shown = [UsageError(p) for p in problems[1:_MOST_SHOWN]]
        if len(problems) > _MOST_SHOWN:
            shown.append(UsageError(f"and {len(problems) - _MOST_SHOWN} more tensors that do not fit"))
        raise UsageError(problems[0], more=tuple(shown))


def _check_tied(found: Mapping[str, Found], model: ModelConfig) -> None:
    """A tied model's file may hold the output layer again; then it must be the embedding, bit for bit."""
    tied = mapping.tied_copy(model)
    if tied is None or tied[0] not in found:
        return
    one, other = found[tied[0]], found[tied[1]]
    hint = "`--untie` keeps both; without it `tie_word_embeddings` in `config.json` must be false"
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        raise UsageError(f"`tie_word_embeddings` is true, but `{tied[0]}` is not of the kind of `{tied[1]}`", hint)
    files, rows = Files(), max(1, _BLOCK // max(1, 4 * model.hidden_size))
    views = [files.view(_place(f, f.shape, False), f.dtype) for f in (one, other)]
    for start in range(0, model.vocab_size, rows):
        a, b = (v[start : start + rows] for v in views)
        if a.tobytes() != b.tobytes():
            raise UsageError(f"`tie_word_embeddings` is true, but `{tied[0]}` differs from `{tied[1]}`", hint)


def _left_out(found: Mapping[str, Found], model: ModelConfig) -> Iterator[str]:
    """A line for each kind of tensor that is not a parameter."""
    wanted, tied = mapping.hf_tensors(model), mapping.tied_copy(model)
    kinds: Counter[str] = Counter()
    for name in found:
        if name in wanted:
            continue
        if tied is not None and name == tied[0]:
            yield f"`{name}`: it is `{tied[1]}` again"
            continue
        kinds[".".join("*" if part.isdigit() else part for part in name.split("."))] += 1
    for kind, count in kinds.items():
        yield f"`{kind}` ({count}): computed, not a parameter"


def _check_vocabulary(args: Mapping[str, Any], model: ModelConfig, where: Path) -> None:
    if not megatron_args.knows_vocab_size(args, model):
        raise UsageError(
            f"`{where}` does not say how many of its {model.vocab_size:,} rows of the vocabulary are padding",
            "give the vocabulary's size with `--vocab-size N` or `--config HF_FOLDER`",
            "`--pad keep` keeps all rows",
        )


def _padded(tensor: Tensor, model: ModelConfig, padded: int, pad_rows: int) -> Tensor:
    """A tensor with the vocabulary's padding rows, if it is one that has them; rows that no source has are zeros."""
    if tensor.key not in vocabulary_atoms(model):
        return tensor
    (fill,) = tensor.fills
    start, kept = model.vocab_size, min(pad_rows, padded - model.vocab_size)
    fills = [fill, Fill(fill.atom, start, kept, 0, fill.columns, pad=True)]
    fills.append(Fill(None, start + kept, padded - start - kept, 0, fill.columns))
    return Tensor(tensor.key, (padded, *tensor.shape[1:]), tuple(f for f in fills if f.rows))


def vocabulary_atoms(model: ModelConfig) -> tuple[str, ...]:
    """Embedding and, where the model has its own, output layer, as Hugging Face names."""
    return tuple(rule.atoms[0] for rule in mapping.RULES[model.family] if rule.key in mapping.VOCABULARY)


def _config(content: Content, config: Mapping[str, Any]) -> bytes:
    """The text of `config.json`: the source's own where nothing changed."""
    source = content.files.get("config.json")
    if source is not None:
        try:
            if read_json(source) == config:
                return source.read_bytes()
        except ValueError:
            pass
    return _json(config)


_OBJECTS = {"cpt.manifest": "how far the run was", "cpt.rng": "random states"}  # of our own checkpoints, for people


def _dropped(content: Content, writing: Writing) -> Iterator[str]:
    if content.has_optimizer:
        yield "optimizer state: a Hugging Face folder has no place for it"
    if content.objects:
        names = ", ".join(_OBJECTS.get(name, f"`{name}`") for name in content.objects)
        yield f"{names}: a Hugging Face folder has no place for it"
    extra = (content.padded_vocab_size or 0) - content.model.vocab_size
    if extra > 0 and not writing.keep_padding:
        yield f"{extra} padding rows of the vocabulary"
    if content.model.hf_config is None and "cpt.manifest" not in content.objects:  # ours was never another program's
        yield (
            f"no `config.json` came along: a new one says `model_type: {content.model.family}`, and nothing of "
            "`eos_token_id`, `bos_token_id` and what else only the first one said (`--config HF_FOLDER` brings it)"
        )


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def file_names(count: int) -> list[str]:
    """Names of the weight files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def grouped(payloads: Sequence[Payload], most: int) -> list[Sequence[Payload]]:
    """Payloads in as few groups of at most `most` bytes as their order allows (a larger one alone).

    Of about equal size, so that workers, who take a file each, end together.
    """
    sizes = [p.nbytes for p in payloads]
    few = len(_starts(sizes, most))
    low, high = sum(sizes) // max(1, few), most
    while low < high:
        if len(_starts(sizes, middle := (low + high) // 2)) > few:
            low = middle + 1
        else:
            high = middle
    return [payloads[first:last] for first, last in itertools.pairwise([*_starts(sizes, high), len(sizes)])]


def _starts(sizes: Sequence[int], most: int) -> list[int]:
    """Where groups begin that are filled one after another."""
    starts: list[int] = []
    full = most
    for i, size in enumerate(sizes):
        if not starts or full + size > most:
            starts.append(i)
            full = 0
        full += size
    return starts


def safetensors(name: str, payloads: Iterable[Payload], shapes: Mapping[str, tuple[int, ...]]) -> OutFile:
    """A safetensors file of payloads.

    Args:
        shapes: of each payload by name.
    """
    payloads = list(payloads)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for p in payloads:
        header[p.name] = {
            "dtype": SPELLED[p.dtype],
            "shape": list(shapes[p.name]),
            "data_offsets": [at, at + p.nbytes],
        }
        at += p.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return OutFile(name, (struct.pack("<Q", len(text)) + text, *payloads))
