"""Megatron-core's `torch_dist` folders, read whatever version and layout wrote them: chunks are only rectangles.

Weights, by canonical name (see `mapping`):

    decoder.layers.mlp.linear_fc1.weight [L, 2F, H]      layers stacked on axis 0, experts on the next
    decoder.layers.3.mlp.linear_fc1.weight [2F, H]       one key a layer, an expert
    ...linear_fc1.weight_w, ...linear_fc1.weight_v       gate and up apart (`singleton_local_shards`)
    mlp.linear_fc1.layer_norm_*, pre_mlp_layernorm.*     the same norm: layer specs name it differently

Optimizer state, all of it perhaps after `chained_N.`:

    optimizer.state.param.<weight>, .exp_avg., .exp_avg_sq.        `fully_reshardable`
    optimizer.state.fp32_param.<weight>, .exp_avg., .exp_avg_sq.   ordinary optimizer
    the same with an extra last axis of flat pieces                `fully_sharded_model_space` (megatron-core to 0.14)
    optimizer.distributed.dp_group_idx_0.gbuf_idx_0....            `dp_reshardable`: flat buckets, see `buckets`
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, buckets, hf_config, mapping, megatron_args, tokenizer_files, torch_zip, unpickle
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint.arrays import CARRIERS, Array, Files, Place, as_matrix, crop, flat_segments, part, places
from cpt.checkpoint.content import LEFT_OPTIMIZER, MAIN, MODEL, MOMENTS, Atom, Content, Layout, Optimizer
from cpt.checkpoint.copies import Parts
from cpt.checkpoint.formats import FORMATS, Format, Output, Reading, Writing
from cpt.checkpoint.manifest import Manifest, Origin
from cpt.checkpoint.mapping import EMBEDDING, Fused
from cpt.checkpoint.torch_dist import COMMON, CONFIG, METADATA, Folder, Record, Tensor
from cpt.plan.types import ModelConfig, to_json

STATES = {"param": MAIN, "fp32_param": MAIN, **{m: m for m in MOMENTS}}  # Megatron's name of a state: ours
COMMON_OBJECT = "common_state/shard_0_1"  # what newer versions of megatron-core (0.19) have instead of `common.pt`
MANIFEST = "cpt.manifest"  # object: what our manifest says beyond model, files and layout
RANDOM = "cpt.rng"  # object: random states of each rank, base64, and the layout of the ranks
RANK = "cpt.rng.rank_{:05d}"  # tensor: the same of one rank
_MOST_RANDOM = 8 << 20  # of them are carried along [bytes]
_CHAINED = r"(?:chained_\d+\.)?"
_STATE = re.compile(_CHAINED + r"optimizer\.state\.(\w+)\.(.+)")
_FLAT = re.compile(_CHAINED + r"optimizer\.distributed\.")
_FLAT_DTYPES = re.compile(r"\.dtype_\(torch\.(\w+), torch\.(\w+)\)\.")  # of parameters and of gradients
_LAYER = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_EXPERT = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(.+)")
_HALF = re.compile(r"(.+linear_fc1\.(?:weight|bias))_([wv])")
_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
# What `common.pt` holds that is not carried over as it is: read here, or made anew.
_READ = frozenset({"args", "checkpoint_version", "iteration", "optimizer", "content_metadata"})
_RANDOM = ("rng_state", "cpt.rng.")
# Values that no gradient reaches: they have no optimizer state.
_BUFFERS = (".router.expert_bias",)
_EXTRA_BYTES = 2048  # records of `_extra_state` that hold nothing are smaller


@FORMATS.add("torch_dist")
class TorchDist(Format):
    name: ClassVar[str] = "torch_dist"

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        if (folder / METADATA).is_file():
            return True
        try:
            return "sharded_backend" in json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError, TypeError):
            return False

    @classmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        return _Reader(folder, reading).content()

    @classmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        from cpt.checkpoint.formats.torch_dist_writing import plan

        return plan(content, writing)

    @classmethod
    def facts(cls, folder: Path) -> Mapping[str, Any]:
        source = Folder(folder)
        common = _common(source)[0]
        said = common.get("content_metadata")
        return {
            "optimizer": said.get("distrib_optim_sharding_type") if isinstance(said, dict) else None,
            "tensors": len(source.tensors),
            "chunks": sum(len(t.chunks) for t in source.tensors.values()),
            "objects": len(source.objects),
        }


@dataclass(frozen=True)
class _Name:
    """A stored tensor's key, taken apart.

    Args:
        key: canonical name with `{i}`, `{e}` for layer and expert.
        layer, expert: their number; None = stacked (or there is none in `key`).
        half: 0 gate, 1 up, where they are apart.
    """

    state: str
    key: str
    layer: int | None
    expert: int | None
    half: int | None

    @property
    def axes(self) -> tuple[bool, bool]:
        """Whether layers, and whether experts, are a leading axis."""
        return "{i}" in self.key and self.layer is None, "{e}" in self.key and self.expert is None

    @property
    def stacked(self) -> int:
        """Leading axes that are layers or experts."""
        return sum(self.axes)

    def canonical(self, index: Sequence[int]) -> str:
        """The name of one slice.

        Args:
            index: on the stacked axes.
        """
        rest = list(index)
        layers, experts = self.axes
        layer = rest.pop(0) if layers else self.layer
        expert = rest.pop(0) if experts else self.expert
        return self.key.replace("{i}", str(layer)).replace("{e}", str(expert))


def _named(key: str) -> _Name | None:
    """A key of a weight or of its optimizer state; None = of a state that is not known."""
    state = MODEL
    if match := _STATE.fullmatch(key):
        if match[1] not in STATES:
            return None
        state, key = STATES[match[1]], match[2]
    half = layer = expert = None
    if match := _HALF.fullmatch(key):
        key, half = match[1], "wv".index(match[2])
    if match := _LAYER.fullmatch(key):
        layer, rest = match[1], match[2]
        for local, canonical in _NORMS.items():
            if rest.startswith(local):
                rest = canonical + rest.removeprefix(local)
        if inner := _EXPERT.fullmatch(rest):
            expert, rest = inner[1], "mlp.experts.experts.{e}." + inner[2]
        key = "decoder.layers.{i}." + rest
    return _Name(state, key, None if layer is None else int(layer), None if expert is None else int(expert), half)


class _Reader:
    """One folder while it is opened."""

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading
        self.source = Folder(folder)
        self.manifest = self._manifest()
        self.common, self.left_out = _common(self.source)
        self.args = _args(self.common.get("args"))
        self.crc32: dict[str, list[tuple[int, int, int]]] = {}
        self.found: dict[tuple[str, bool, str], list[Place]] = {}
        self.dtypes: dict[tuple[str, bool, str], str] = {}
        self.owners: dict[tuple[str, str, int | None], str] = {}
        self.files = Files()

    def content(self) -> Content:
        model = self._model()
        padded = self._rows(model)
        expected = mapping.megatron_tensors(model, padded)
        flat, unknown, left = [], [], False
        for key, tensor in self.source.tensors.items():
            if key.startswith(("cpt.", "rng_state")) or key.endswith("_extra_state"):
                continue
            if "optimizer." in key and not self.reading.optimizer:
                left = True
                continue
            if _FLAT.match(key):
                flat.append(key)
                continue
            name = _named(key)
            if name is None or not self._add(tensor, name, model, expected):
                unknown.append(key)
        if unknown:
            raise self._unknown(unknown, model, expected)
        self.left_out += [LEFT_OPTIMIZER] if left else []
        optimizer = self._optimizer(flat) if self.reading.optimizer else None
        layout = self._layout(model)
        parts = self._flat_parts(model, layout, padded, expected) if flat and optimizer else None
        atoms = self._atoms(model, padded, expected, parts, optimizer is not None)
        objects = self._objects()
        self._note_objects(objects)
        self.files.close()
        self.source.close()
        iteration = self.common.get("iteration", self.args.get("iteration") if self.args else None)
        return Content(
            format=TorchDist.name,
            path=self.folder,
            model=model,
            atoms=atoms,
            padded_vocab_size=padded,
            optimizer=optimizer,
            iteration=iteration if isinstance(iteration, int) and iteration > 0 else None,
            common=self._kept(),
            args=self.args,
            objects=objects,
            layout=layout,
            left_out=tuple(self.left_out),
            crc32={file: tuple(sorted(sums)) for file, sums in self.crc32.items()},
            files=self._beside(),
        )

    def _beside(self) -> dict[str, Path]:
        """The tokenizer's files, where the checkpoint has them or its run says where they are."""
        tokenizer = tokenizer_files.of_checkpoint(self.folder)
        return {} if tokenizer is None else tokenizer_files.named(tokenizer)

    def _manifest(self) -> Manifest | None:
        if not (self.folder / manifests.NAME).exists():
            return None
        why = manifests.why_not_whole(self.folder)
        if why is not None:
            raise UsageError(f"`{self.folder}` is not whole: {why}", "use the newest whole checkpoint before it")
        return manifests.read(self.folder)

    def _model(self) -> ModelConfig:
        vocab_size, config = self.reading.vocab_size, self.reading.config
        if self.manifest is not None:
            known = self.manifest.model.vocab_size
            if vocab_size not in (None, known):
                raise UsageError(f"`--vocab-size` is {vocab_size}, `{self.folder / manifests.NAME}` says {known}")
            return self.manifest.model
        where = str(self.folder / COMMON)
        if self.args is not None:
            return megatron_args.to_model(self.args, where, config, vocab_size=vocab_size)
        if config is not None:
            return hf_config.read_config(config)
        raise UsageError(
            f"`{where}` holds no arguments (`args`), so it does not say what the model is",
            "give the model's Hugging Face folder with `--config`",
        )

    def _rows(self, model: ModelConfig) -> int:
        """Rows of the stored vocabulary."""
        stored = self.source.tensors.get(EMBEDDING)
        if stored is None:
            raise UsageError(f"`{self.folder}` has no tensor `{EMBEDDING}`{_near(EMBEDDING, self.source.tensors)}")
        rows = stored.shape[0] if stored.shape else 0
        if rows < model.vocab_size:
            raise UsageError(
                f"`{self.folder}`: `{EMBEDDING}` has {rows} rows, the vocabulary has {model.vocab_size} (`vocab_size`)"
            )
        return rows

    def _add(self, tensor: Tensor, name: _Name, model: ModelConfig, expected: Mapping[str, Fused]) -> bool:
        """Take in a stored tensor; False when the model has no such tensor.

        Raises:
            UsageError: its shape is not the model's, or its values are not where they should be.
        """
        lead = name.stacked
        fused = expected.get(name.canonical((0,) * lead))
        if fused is None and lead:  # layers stacked, of which the first has no such tensor
            fused = next((expected[k] for k in self._keys(name, tensor) if k in expected), None)
        if fused is None:
            return False
        whole = fused.tensor.shape
        halves = 1 if name.half is None else 2
        wanted = (whole[0] // halves, *whole[1:])
        stack = [n for n, axis in zip((model.num_layers, model.num_experts), name.axes, strict=True) if axis]
        original = self.source.original_shapes.get(tensor.key, tensor.shape)
        if list(original) != [*stack, *wanted]:
            raise UsageError(
                f"`{self.folder}`: `{tensor.key}` has shape {list(original)}, the model wants {[*stack, *wanted]}"
            )
        keys = list(self._keys(name, tensor))
        for key in keys:
            if key not in expected:
                raise UsageError(f"`{self.folder}`: `{tensor.key}` holds `{key}`, which the model does not have")
            owner = self.owners.setdefault((name.state, key, name.half), tensor.key)
            if owner != tensor.key:
                raise UsageError(f"`{self.folder}` has `{key}` twice: as `{owner}` and as `{tensor.key}`")
        arrays.itemsize(tensor.dtype)
        flat = tensor.key in self.source.original_shapes
        base = whole[0] // halves * (name.half or 0)
        for record in tensor.chunks:
            if math.prod(record.size) == 0:
                continue
            start = self._located(record)
            if flat:
                self._add_flat(record, start, name, expected, original, base)
            else:
                self._add_chunk(record, start, name, expected, base)
        return True

    def _keys(self, name: _Name, tensor: Tensor) -> Iterator[str]:
        shape = self.source.original_shapes.get(tensor.key, tensor.shape)
        for index in itertools.product(*(range(n) for n in shape[: name.stacked])):
            yield name.canonical(index)

    def _located(self, record: Record) -> int:
        """Where a chunk's values start in its file; notes their checksum."""
        stored = self.source.located(record)
        self.crc32.setdefault(self._file(record), []).append((stored.start, stored.length, stored.crc32))
        return stored.start

    def _add_chunk(self, record: Record, start: int, name: _Name, expected: Mapping[str, Fused], base: int) -> None:
        lead = name.stacked
        rows, columns = as_matrix(record.size[lead:])
        row, column = _corner(record.offset[lead:])
        size = arrays.itemsize(record.dtype)
        spans = (range(o, o + n) for o, n in zip(record.offset[:lead], record.size[:lead], strict=True))
        for i, index in enumerate(itertools.product(*spans)):
            fused = self._slice(record, name, index, expected)
            at = start + i * rows * columns * size
            cropped = crop(fused.tensor.fills, base + row, rows, column, columns)
            self._put(name.state, record, places(cropped, self._file(record), at, columns, record.dtype))

    def _add_flat(
        self,
        record: Record,
        start: int,
        name: _Name,
        expected: Mapping[str, Fused],
        original: tuple[int, ...],
        base: int,
    ) -> None:
        """A piece of a flattened block: axes count blocks, the last axis is the place inside the block."""
        assert record.shape is not None
        counts = record.shape[:-1]
        block = tuple(n // max(1, c) for n, c in zip(original, counts, strict=False))
        if (
            len(counts) != len(original)
            or tuple(b * c for b, c in zip(block, counts, strict=True)) != tuple(original)
            or math.prod(block) != record.shape[-1]
            or record.size[:-1] != (1,) * len(counts)
        ):
            raise UsageError(
                f"`{self.folder}`: `{record.key}` has shape {list(record.shape)}, which are not flat pieces of "
                f"{list(original)}"
            )
        lead = name.stacked
        rows, columns = as_matrix(block[lead:])
        corner = [b * i for b, i in zip(block, record.offset[:-1], strict=True)]
        row, column = _corner(corner[lead:])
        size = arrays.itemsize(record.dtype)
        first, last = record.offset[-1], record.offset[-1] + record.size[-1]
        spans = (range(o, o + n) for o, n in zip(corner[:lead], block[:lead], strict=True))
        for i, index in enumerate(itertools.product(*spans)):
            begin, end = max(first, i * rows * columns), min(last, (i + 1) * rows * columns)
            if begin >= end:
                continue
            fused = self._slice(record, name, index, expected)
            inner = part(fused.tensor, [(base + row, base + row + rows)], (column, column + columns))
            at = start + (begin - first) * size
            for segment in flat_segments(inner, begin - i * rows * columns, end - i * rows * columns):
                placed = places(segment.fills, self._file(record), at, segment.columns, record.dtype)
                self._put(name.state, record, placed)
                at += segment.rows * segment.columns * size

    def _slice(self, record: Record, name: _Name, index: Sequence[int], expected: Mapping[str, Fused]) -> Fused:
        key = name.canonical(index)
        if key not in expected:
            raise UsageError(f"`{self.folder}`: a chunk of `{record.key}` at {list(record.offset)} lies outside it")
        return expected[key]

    def _put(self, state: str, record: Record, placed: Iterator[tuple[str, bool, Place]]) -> None:
        for atom, pad, place in placed:
            key = (atom, pad, state)
            if self.dtypes.setdefault(key, record.dtype) != record.dtype:
                raise UsageError(f"`{self.folder}`: `{record.key}` is {record.dtype}, its other half another dtype")
            self.found.setdefault(key, []).append(place)

    def _file(self, record: Record) -> str:
        return os.path.join(self.folder, record.file)

    def _optimizer(self, flat: Sequence[str]) -> Optimizer | None:
        """Step and groups, where there is optimizer state."""
        there = {state for _, _, state in self.found} - {MODEL}
        if not there and not flat:
            return None
        if self.manifest is not None and self.manifest.optimizer is not None:
            said = self.manifest.optimizer
            groups = tuple(dict(g) for g in said.get("groups", ()))
            return Optimizer(step=int(said["step"]), groups=groups, form=self._form(flat), gradients=_gradients(flat))
        value = self.common.get("optimizer")
        dicts: list[Any] = [value]
        if isinstance(value, dict) and value and all(isinstance(k, int) for k in value):
            dicts = [value[k] for k in sorted(value)]
        if flat:
            stored = [k for k in self.source.objects if re.search(r"\.optimizer/shard_", k)]
            dicts += [{"optimizer": self._object(k)} for k in sorted(stored)]
        found, steps = _groups(dicts)
        if not steps:
            raise UsageError(f"`{self.folder / COMMON}` does not say how many updates the optimizer made")
        return Optimizer(step=max(steps), groups=tuple(found), form=self._form(flat), gradients=_gradients(flat))

    def _form(self, flat: Sequence[str]) -> str:
        """How the optimizer's state is stored."""
        if flat:
            return "dp_reshardable"
        if any(".state." in key for key in self.source.original_shapes):
            return "fully_sharded_model_space"
        return "fully_reshardable" if any(".state.param." in key for key in self.source) else "plain"

    def _object(self, key: str) -> Any:
        """The value of an object's record."""
        record = self.source.objects[key]
        path = self._file(record)
        value = torch_zip.read(self.files.map(path), record.start, record.length, path).value
        if not isinstance(value, list) or len(value) != 1:
            raise UsageError(f"`{path}`: the object `{key}` is not a list of one")
        return value[0]

    def _layout(self, model: ModelConfig) -> Layout:
        args = self.args or {}
        if self.manifest is not None and "expert_model_parallel_size" not in args:  # an engine of ours saved it
            of = self.manifest.layout
            return Layout(tp=of.tp, pp=of.pp, vp=of.vp, dp=of.dp, layers=of.layers)
        return megatron_args.to_layout(args, model, str(self.folder / COMMON))

    def _flat_parts(self, model: ModelConfig, layout: Layout, padded: int, expected: Mapping[str, Fused]) -> Parts:
        """Main weights and moments out of flat buckets."""
        parts = Parts(self.files, first_replica=self.reading.first_replica)
        specs = ["local", "te"]
        if (self.args or {}).get("transformer_impl") == "transformer_engine":
            specs.reverse()

        def dtype_of(key: str) -> str:
            atom = next(f.atom for f in expected[key].tensor.fills if f.atom)
            if (atom, False, MODEL) not in self.dtypes:
                raise self._missing(key, MODEL)
            return self.dtypes[atom, False, MODEL]

        def lengths(group: buckets.Group) -> Any:
            key = f"{group.prefix}per_bucket_numel_unpadded/shard_0_1"
            if key not in self.source.objects:
                raise UsageError(f"`{self.folder}` has no object `{key}`{_near(key, self.source.objects)}")
            return self._object(key)

        def flat(key: str) -> buckets.Flat:
            if key not in self.source:
                raise UsageError(f"`{self.folder}` has no tensor `{key}`{_near(key, self.source.tensors)}")
            stored = self.source.tensors[key]
            if len(stored.shape) != 1:
                raise UsageError(f"`{self.folder}`: `{key}` has shape {list(stored.shape)}, wanted one axis")
            pieces = tuple(
                buckets.Piece(r.offset[0], r.size[0], self._file(r), self._located(r)) for r in stored.chunks
            )
            return buckets.Flat(stored.dtype, stored.shape[0], pieces)

        def weight(atom: str, pad: bool) -> Array | None:
            found = self.found.get((atom, pad, MODEL))
            if found is None:
                return None
            return Array(self.dtypes[atom, pad, MODEL], shapes[atom, pad], tuple(found))

        shapes = _shapes(model, padded)
        buckets.read(
            parts,
            model,
            layout,
            padded,
            specs=specs,
            dtype_of=dtype_of,
            lengths=lengths,
            flat=flat,
            weights=weight,
            files=self.files,
        )
        self.left_out += parts.overridden
        return parts

    def _atoms(
        self, model: ModelConfig, padded: int, expected: Mapping[str, Fused], parts: Parts | None, optimizer: bool
    ) -> dict[str, Atom]:
        """Every logical tensor, each state whole.

        Raises:
            UsageError: something is missing or there twice.
        """
        key_of = {f.atom: key for key, fused in expected.items() for f in fused.tensor.fills if f.atom}
        made = {}
        shapes = _shapes(model, padded)
        for name in mapping.atom_shapes(model):
            both: list[dict[str, Array]] = []
            for pad in (False, True):
                states: dict[str, Array] = {}
                shape = shapes.get((name, pad))
                for state in (MODEL, *dict.fromkeys(STATES.values())) if shape else ():
                    assert shape is not None
                    array = None
                    if (name, pad, state) in self.found:
                        array = Array(self.dtypes[name, pad, state], shape, tuple(self.found[name, pad, state]))
                    elif parts is not None:
                        array = parts.array(state, name, shape, pad=pad)
                    if array is None:
                        continue
                    why = arrays.why_not_tiled(array)
                    if why is not None:
                        owner = self.owners.get((state, key_of[name], None), key_of[name])
                        raise UsageError(f"`{self.folder}`: of `{owner}` ({name}, {state}) {why}")
                    states[state] = array
                both.append(states)
            states, padding = both
            for state in self._wanted(states, key_of[name], optimizer):
                if state not in states:
                    raise self._missing(key_of[name], state)
            for of in both:
                if optimizer and MAIN not in of and MODEL in of and of[MODEL].dtype == "float32":
                    of[MAIN] = of[MODEL]
            made[name] = Atom(
                name=name, shape=shapes[name, False], dtype=states[MODEL].dtype, states=states, pad=padding
            )
        return made

    def _wanted(self, states: Mapping[str, Array], key: str, optimizer: bool) -> Iterator[str]:
        yield MODEL
        if optimizer and not key.endswith(_BUFFERS):
            yield from MOMENTS
            if MODEL in states and states[MODEL].dtype != "float32":
                yield MAIN

    def _missing(self, key: str, state: str) -> UsageError:
        name = key
        if state != MODEL:
            spelled = [m for m, ours in STATES.items() if ours == state]
            form = next((s for s in spelled if any(f"optimizer.state.{s}." in k for k in self.source)), spelled[0])
            name = f"optimizer.state.{form}.{key}"
        return UsageError(f"`{self.folder}` has no tensor `{name}`{_near(name, self.source.tensors)}")

    def _unknown(self, keys: Sequence[str], model: ModelConfig, expected: Mapping[str, Fused]) -> UsageError:
        first = keys[0]
        match = _STATE.fullmatch(first)
        if match and match[1] not in STATES:
            return UsageError(f"`{self.folder}`: `{first}` is optimizer state of a kind that is not known")
        bare = match[2] if match else first
        spelled = {re.sub(r"layers\.\d+\.", "layers.", re.sub(r"experts\.\d+\.", "", k)) for k in expected} | set(
            expected
        )
        others = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        return UsageError(
            f"`{self.folder}`: `{first}`{others} is no tensor of a `{model.family}` model as the arguments describe it"
            f"{_near(bare, {k: None for k in spelled})}"
        )

    def _note_objects(self, objects: Mapping[str, Any]) -> None:
        """Say what is left behind."""
        keys = [*self.source.objects, *self.source.tensors]
        random = sum(k.startswith(_RANDOM) for k in keys)
        if random and RANDOM not in objects:
            self.left_out.append(f"random states of {random} ranks: they belong to the layout that saved them")
        scales = 0
        for key, record in self.source.objects.items():
            if "_extra_state" in key:
                scales += record.length > _EXTRA_BYTES
            elif key != COMMON_OBJECT and not _FLAT.match(key) and not key.startswith(_RANDOM):
                self.left_out.append(f"the object `{key}`")
        if scales:
            self.left_out.append(f"{scales} `_extra_state` objects of layers (scaling factors of FP8)")
        for key in self.source.tensors:
            if key.startswith("cpt.") and not key.startswith(_RANDOM):
                self.left_out.append(f"the tensor `{key}`")

    def _kept(self) -> dict[str, Any]:
        kept = {}
        for key, value in self.common.items():
            if key in _READ or (isinstance(key, str) and key.startswith(("rng_state", "model"))):
                continue
            try:
                kept[str(key)] = plain(value)
            except TypeError as error:
                self.left_out.append(f"`{key}` of `{COMMON}`: it holds {error}")
        return kept

    def _objects(self) -> dict[str, Any]:
        """What a run of ours saved beside the tensors."""
        m = self.manifest
        if m is None:
            return {}
        objects: dict[str, Any] = {}
        if m.origin != Origin() or set(m.progress) != {"step"}:
            said = {"origin": to_json(m.origin), "phase": m.phase, "step": m.step, "tokens": m.tokens}
            objects[MANIFEST] = said | {"progress": dict(m.progress)}
        states = [self.source.tensors.get(RANK.format(rank)) for rank in range(m.rng_ranks)]
        plain = [t for t in states if t is not None and t.dtype == "uint8" and len(t.chunks) == 1]
        if plain and len(plain) == len(states) and sum(t.chunks[0].length for t in plain) <= _MOST_RANDOM:
            texts = []
            for tensor in plain:
                (record,) = tensor.chunks
                start, length = self._located(record), math.prod(record.size)
                data = self.files.map(self._file(record))
                texts.append(base64.b64encode(data[start : start + length]).decode())
            of = m.layout
            objects[RANDOM] = {"layout": [of.tp, of.pp, of.dp, of.vp], "ranks": texts}
        return objects


def plain(value: Any) -> Any:
    """A value as JSON holds it; tuples become lists.

    Raises:
        TypeError: it holds something else; names its class.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    kind = f"`{value.module}.{value.name}`" if isinstance(value, unpickle.Inert) else f"a `{type(value).__name__}`"
    raise TypeError(kind)


def _shapes(model: ModelConfig, padded: int) -> dict[tuple[str, bool], tuple[int, ...]]:
    """Shape of every logical tensor, and of its padding rows where there are some, by (name, whether padding)."""
    shapes: dict[tuple[str, bool], tuple[int, ...]] = {}
    for name, shape in mapping.atom_shapes(model).items():
        shapes[name, False] = shape
    if padded > model.vocab_size:
        for key, fused in mapping.megatron_tensors(model, padded).items():
            if key in mapping.VOCABULARY:
                for f in fused.tensor.fills:
                    if f.pad and f.atom:
                        shapes[f.atom, True] = (f.rows, f.columns)
    return shapes


def _gradients(flat: Iterable[str]) -> dict[str, str]:
    """Dtype of gradients by dtype of parameters, as the keys of flat buffers say; the first key of several counts."""
    found: dict[str, str] = {}
    for match in filter(None, map(_FLAT_DTYPES.search, flat)):
        found.setdefault(match[1], match[2])
    return found


def _corner(offset: Sequence[int]) -> tuple[int, int]:
    """(row, column) of a block's first value."""
    return (offset[0] if offset else 0, offset[1] if len(offset) > 1 else 0)


def _near(name: str, known: Mapping[str, object]) -> str:
    return mapping.suggest(name, known)


def _common(source: Folder) -> tuple[dict[str, Any], list[str]]:
    """What `common.pt`, or the object in its stead, holds, tensors of one value as numbers; and a list of what is
    left out, empty so far.

    Raises:
        UsageError: it is missing or damaged.
    """
    path, record = source.path / COMMON, source.objects.get(COMMON_OBJECT)
    if path.is_file():
        record = None
    elif record is None:
        raise UsageError(f"`{path}` is missing: the save never finished or the copy is incomplete")
    else:
        path = source.path / record.file
    data = Files().map(os.fspath(path))
    archive = torch_zip.read(data, *((record.start, record.length) if record else (0, len(data))), path)
    value = archive.value[0] if record and isinstance(archive.value, list) and archive.value else archive.value
    if not isinstance(value, dict):
        raise UsageError(f"`{path}` does not hold a Megatron checkpoint's common part")

    def numbers(value: Any) -> Any:
        if isinstance(value, unpickle.TensorRecord):
            stored = archive.storages.get(value.storage.key)
            if stored is None or value.storage.dtype not in CARRIERS or math.prod(value.size) != 1:
                return value
            held = np.frombuffer(data, CARRIERS[value.storage.dtype], 1, stored.start)
            return arrays.convert(held.reshape(1, 1), value.storage.dtype, "float64").item()
        if isinstance(value, dict):
            return {k: numbers(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(numbers(v) for v in value)
        return value

    return numbers(value), []


def _args(value: Any) -> dict[str, Any] | None:
    """Megatron's arguments, plain ones only; dtypes by name."""
    if not isinstance(value, unpickle.Inert):
        return None
    made = {}
    for name, held in vars(value).items():
        if name in ("args", "state"):  # the record's own fields
            continue
        try:
            made[name] = plain(held)
        except TypeError:
            continue
    return made


def _groups(dicts: Sequence[Any]) -> tuple[list[dict[str, Any]], list[int]]:
    """(parameter groups, step counts) out of the optimizers' own dictionaries."""
    groups: list[dict[str, Any]] = []
    steps: list[int] = []

    def count(value: Any) -> None:
        if isinstance(value, int | float) and not isinstance(value, bool) and value == int(value):
            steps.append(int(value))

    for outer in dicts:
        inner = outer.get("optimizer", outer) if isinstance(outer, dict) else None
        if not isinstance(inner, dict):
            continue
        for group in inner.get("param_groups") or ():
            count(group.get("step"))
            kept = {}
            for name, value in group.items():
                if name in ("params", "step"):
                    continue
                try:
                    kept[str(name)] = plain(value)
                except TypeError:
                    continue
            groups.append(kept)
        state = inner.get("state")
        if isinstance(state, dict):
            count(state.get("common_step"))
    return groups, steps
