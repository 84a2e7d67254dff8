"""Hugging Face folders: `config.json` and safetensors, one file or several with an index."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

from cpt.base.errors import UsageError
from cpt.checkpoint import hf_config, mapping
from cpt.checkpoint.arrays import Array, OutFile, Payload, payload, places
from cpt.checkpoint.content import MODEL, Atom, Content
from cpt.checkpoint.formats import FORMATS, Format, Output, Reading, Writing
from cpt.checkpoint.safetensors_files import INDEX, read_headers
from cpt.checkpoint.writing import FileSums

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


@FORMATS.add("hf")
class HuggingFace(Format):
    name: ClassVar[str] = "hf"

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        return (folder / "config.json").is_file()

    @classmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        model = hf_config.read_config(folder)
        headers = read_headers(folder)
        wanted = mapping.hf_tensors(model)
        atoms = {}
        for name, tensor in wanted.items():
            if name not in headers:
                raise UsageError(f"`{folder}` has no tensor `{name}`{mapping.suggest(name, headers)}")
            found = headers[name]
            if found.shape != tensor.shape:
                raise UsageError(
                    f"`{found.file}`: `{name}` has shape {list(found.shape)}, `config.json` says {list(tensor.shape)}"
                )
            dtype = DTYPES.get(found.dtype, found.dtype)
            _, columns = tensor.matrix
            at = tuple(p for _, _, p in places(tensor.fills, found.file, found.start, columns, dtype))
            shape = mapping.atom_shapes(model)[name]
            atoms[name] = Atom(name=name, shape=shape, dtype=dtype, states={MODEL: Array(dtype, shape, at)})
        return Content(format=cls.name, path=folder, model=model, atoms=atoms)

    @classmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        tensors = mapping.hf_tensors(content.model)
        payloads = [payload(t, MODEL, writing.dtype or content.atoms[n].dtype) for n, t in tensors.items()]
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        groups = list(grouped(payloads, writing.file_bytes))
        names = file_names(len(groups))
        files = tuple(safetensors(name, group, shapes) for name, group in zip(names, groups, strict=True))
        config = hf_config.write_config(content.model, payloads[0].dtype)

        def finish(sums: Mapping[str, FileSums]) -> dict[str, bytes]:
            made = {}
            if len(names) > 1:
                where = {p.name: name for name, group in zip(names, groups, strict=True) for p in group}
                total = sum(p.nbytes for p in payloads)
                made[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})
            return made | {"config.json": _json(config)}

        return Output(files=files, finish=finish, copies=dict(content.files))


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def file_names(count: int) -> list[str]:
    """Names of the weight files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def grouped(payloads: Iterable[Payload], most: int) -> Iterator[list[Payload]]:
    """Payloads in groups of at most `most` bytes (a larger one alone), in order."""
    group: list[Payload] = []
    size = 0
    for p in payloads:
        if group and size + p.nbytes > most:
            yield group
            group, size = [], 0
        group.append(p)
        size += p.nbytes
    if group:
        yield group


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
