"""Megatron-core's `torch_dist` folders, read whatever version and layout wrote them: chunks are only rectangles.

See `torch_dist_names` for what things are called, `torch_dist_reading` for chunks, `torch_dist_common` for the rest.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from cpt.base.errors import UsageError
from cpt.base.records import to_json
from cpt.checkpoint import arrays, bucket_reading, buckets, hf_config, mapping, megatron_args, tokenizer_files
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint.arrays import Array, Files
from cpt.checkpoint.content import LEFT_OPTIMIZER, MAIN, MODEL, MOMENTS, Atom, Content, Layout, Optimizer
from cpt.checkpoint.copies import Parts
from cpt.checkpoint.formats import FORMATS, Output, Reading, WritableFormat, Writing
from cpt.checkpoint.formats import torch_dist_common as commons
from cpt.checkpoint.formats.torch_dist_names import (
    FLAT,
    MANIFEST,
    RANDOM,
    RANK,
    STATE,
    STATES,
    gradients,
    named,
)
from cpt.checkpoint.formats.torch_dist_reading import Chunks, shapes_of
from cpt.checkpoint.manifest import Manifest, Origin
from cpt.checkpoint.mapping import EMBEDDING, Fused
from cpt.checkpoint.torch_dist import COMMON, COMMON_OBJECT, CONFIG, METADATA, Folder
from cpt.plan.model import ModelConfig

_MOST_RANDOM = 8 << 20  # of them are carried along [bytes]
# What `common.pt` holds that is not carried over as it is: read here, or made anew.
_READ = frozenset({"args", "checkpoint_version", "iteration", "optimizer", "content_metadata"})
_RANDOM = ("rng_state", "cpt.rng.")
# Values that no gradient reaches: they have no optimizer state.
_BUFFERS = (".router.expert_bias",)
_EXTRA_BYTES = 2048  # records of `_extra_state` that hold nothing are smaller


@FORMATS.add("torch_dist")
class TorchDist(WritableFormat):
    name: ClassVar[str] = "torch_dist"
    title: ClassVar[str] = "Megatron's torch_dist format"

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
    def why_not_whole(cls, folder: Path) -> str | None:
        if not (folder / METADATA).is_file():
            return f"`{METADATA}` is missing"
        try:
            source = Folder(folder)
            source.common()
            source.close()
        except UsageError as error:
            return error.message.replace(f"`{folder}/", "`")
        needed: dict[str, int] = {}
        for record in (*(r for t in source.tensors.values() for r in t.chunks), *source.objects.values()):
            needed[record.file] = max(needed.get(record.file, 0), record.start + record.length)
        for name, least in sorted(needed.items()):
            if not (folder / name).is_file():
                return f"`{name}` is missing"
            if (size := (folder / name).stat().st_size) < least:
                return f"`{name}` has {size:,} bytes, `{METADATA}` says {least:,}" if size else f"`{name}` is empty"
        return None

    @classmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        from cpt.checkpoint.formats.torch_dist_writing import plan

        return plan(content, writing)

    @classmethod
    def facts(cls, folder: Path) -> Mapping[str, Any]:
        source = Folder(folder)
        common = source.common()
        said = common.get("content_metadata")
        return {
            "optimizer": said.get("distrib_optim_sharding_type") if isinstance(said, dict) else None,
            "tensors": len(source.tensors),
            "chunks": sum(len(t.chunks) for t in source.tensors.values()),
            "objects": len(source.objects),
        }


class _Reader:
    """One folder while it is opened."""

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading
        self.source = Folder(folder)
        self.manifest = self._manifest()
        self.common = self.source.common()
        self.left_out: list[str] = []
        self.args = commons.arguments(self.common.get("args"))
        self.files = Files()
        self.chunks = Chunks(self.source, self.files)

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
            if FLAT.match(key):
                flat.append(key)
                continue
            name = named(key)
            if name is None or not self.chunks.add(tensor, name, model, expected):
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
        if self.manifest is not None and isinstance(iteration, int) and iteration != self.manifest.step:
            raise UsageError(
                f"`{self.folder / manifests.NAME}` says step {self.manifest.step:,}, `{COMMON}` {iteration:,}: one of "
                "them was changed"
            )
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
            crc32={file: tuple(sorted(sums)) for file, sums in self.chunks.crc32.items()},
            files=self._beside(),
        )

    def _beside(self) -> dict[str, Path]:
        """What lies beside the weights; the tokenizer's files also where only its run says where they are."""
        tokenizer = tokenizer_files.of_checkpoint(self.folder)
        return tokenizer_files.in_folder(self.folder) | (tokenizer_files.named(tokenizer) if tokenizer else {})

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
            raise UsageError(
                f"`{self.folder}` has no tensor `{EMBEDDING}`{mapping.suggest(EMBEDDING, self.source.tensors)}"
            )
        rows = stored.shape[0] if stored.shape else 0
        if rows < model.vocab_size:
            raise UsageError(
                f"`{self.folder}`: `{EMBEDDING}` has {rows} rows, the vocabulary has {model.vocab_size} (`vocab_size`)"
            )
        return rows

    def _optimizer(self, flat: Sequence[str]) -> Optimizer | None:
        """Step and groups, where there is optimizer state."""
        there = {state for _, _, state in self.chunks.places} - {MODEL}
        if not there and not flat:
            return None
        if self.manifest is not None and self.manifest.optimizer is not None:
            said = self.manifest.optimizer
            groups = tuple(dict(g) for g in said.get("groups", ()))
            return Optimizer(step=int(said["step"]), groups=groups, form=self._form(flat), gradients=gradients(flat))
        value = self.common.get("optimizer")
        dicts: list[Any] = [value]
        if isinstance(value, dict) and value and all(isinstance(k, int) for k in value):
            dicts = [value[k] for k in sorted(value)]
        if flat:
            stored = [k for k in self.source.objects if re.search(r"\.optimizer/shard_", k)]
            dicts += [{"optimizer": self.chunks.object(k)} for k in sorted(stored)]
        found, steps = commons.groups(dicts)
        if not steps:
            raise UsageError(f"`{self.folder / COMMON}` does not say how many updates the optimizer made")
        return Optimizer(step=max(steps), groups=tuple(found), form=self._form(flat), gradients=gradients(flat))

    def _form(self, flat: Sequence[str]) -> str:
        """How the optimizer's state is stored."""
        if flat:
            return "dp_reshardable"
        if any(".state." in key for key in self.source.original_shapes):
            return "fully_sharded_model_space"
        return "fully_reshardable" if any(".state.param." in key for key in self.source) else "plain"

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
            if (atom, False, MODEL) not in self.chunks.dtypes:
                raise self._missing(key, MODEL)
            return self.chunks.dtypes[atom, False, MODEL]

        def lengths(group: buckets.Group) -> Any:
            key = f"{group.prefix}per_bucket_numel_unpadded/shard_0_1"
            if key not in self.source.objects:
                raise UsageError(f"`{self.folder}` has no object `{key}`{mapping.suggest(key, self.source.objects)}")
            return self.chunks.object(key)

        def flat(key: str) -> buckets.Flat:
            if key not in self.source:
                raise UsageError(f"`{self.folder}` has no tensor `{key}`{mapping.suggest(key, self.source.tensors)}")
            stored = self.source.tensors[key]
            if len(stored.shape) != 1:
                raise UsageError(f"`{self.folder}`: `{key}` has shape {list(stored.shape)}, wanted one axis")
            pieces = tuple(
                buckets.Piece(r.offset[0], r.size[0], self.chunks.file(r), self.chunks.located(r))
                for r in stored.chunks
            )
            return buckets.Flat(stored.dtype, stored.shape[0], pieces)

        def weight(atom: str, pad: bool) -> Array | None:
            return self.chunks.array(atom, pad, MODEL, shapes[atom, pad])

        shapes = shapes_of(model, padded)
        bucket_reading.read(
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
        shapes = shapes_of(model, padded)
        for name in mapping.atom_shapes(model):
            both: list[dict[str, Array]] = []
            for pad in (False, True):
                states: dict[str, Array] = {}
                shape = shapes.get((name, pad))
                for state in (MODEL, *dict.fromkeys(STATES.values())) if shape else ():
                    assert shape is not None
                    array = self.chunks.array(name, pad, state, shape)
                    if array is None and parts is not None:
                        array = parts.array(state, name, shape, pad=pad)
                    if array is None:
                        continue
                    why = arrays.why_not_tiled(array)
                    if why is not None:
                        owner = self.chunks.owners.get((state, key_of[name], None), key_of[name])
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
        return UsageError(f"`{self.folder}` has no tensor `{name}`{mapping.suggest(name, self.source.tensors)}")

    def _unknown(self, keys: Sequence[str], model: ModelConfig, expected: Mapping[str, Fused]) -> UsageError:
        first = keys[0]
        match = STATE.fullmatch(first)
        if match and match[1] not in STATES:
            return UsageError(f"`{self.folder}`: `{first}` is optimizer state of a kind that is not known")
        bare = match[2] if match else first
        spelled = {re.sub(r"layers\.\d+\.", "layers.", re.sub(r"experts\.\d+\.", "", k)) for k in expected} | set(
            expected
        )
        others = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
        return UsageError(
            f"`{self.folder}`: `{first}`{others} is no tensor of a `{model.family}` model as the arguments describe it"
            f"{mapping.suggest(bare, {k: None for k in spelled})}"
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
            elif key != COMMON_OBJECT and not FLAT.match(key) and not key.startswith(_RANDOM):
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
                kept[str(key)] = commons.plain(value)
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
                start, length = self.chunks.located(record), math.prod(record.size)
                data = self.files.map(self.chunks.file(record))
                texts.append(base64.b64encode(data[start : start + length]).decode())
            of = m.layout
            objects[RANDOM] = {"layout": [of.tp, of.pp, of.dp, of.vp], "ranks": texts}
        return objects
