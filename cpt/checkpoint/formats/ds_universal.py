"""DeepSpeed's universal checkpoints, read only.

    latest_universal                                beside the folder: its name
    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt   a dictionary with the whole tensor under `param`, or just the tensor
    zero/<parameter>/step.pt                        updates made, in some versions
    zero/optimizer_state.pt                         hyperparameters of the parameter groups
    mp_rank_*_model_states.pt                       iteration, scheduler, and the module of one tensor rank

Parameters are whole whatever ranks wrote them; a tensor of ZeRO 3 may be flat. Names are the model's own: those of
Hugging Face (perhaps behind `module.`) or of megatron-core. The weights a model computes with are the `fp32` ones,
rounded; where the module is there whole, they are those of the module. What the model is says a `config.json`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from cpt.base.errors import UsageError
from cpt.checkpoint import hf_config, layouts, mapping, torch_zip, unpickle
from cpt.checkpoint.arrays import (
    CARRIERS,
    Array,
    Files,
    Fill,
    Place,
    Tensor,
    as_matrix,
    itemsize,
    places,
    why_not_tiled,
)
from cpt.checkpoint.content import LEFT_OPTIMIZER, MAIN, MODEL, OPTIMIZER, Atom, Content, Optimizer
from cpt.checkpoint.copies import differences
from cpt.checkpoint.formats import FORMATS, Format, Reading
from cpt.checkpoint.unpickle import TensorRecord
from cpt.plan.model import ModelConfig

ZERO, STEP, GROUPS = "zero", "step.pt", "optimizer_state.pt"
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
# Entries of a model_states file that are of DeepSpeed's own ranks, or told elsewhere.
_OWN = {"module", "args", "dtype", "ds_config", "ds_version", "param_shapes", "frozen_param_shapes", "iteration"}
_OWN |= {"frozen_param_fragments", "shared_params", "buffer_names", "optimizer", "universal_checkpoint_info"}
_OWN |= {
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
    "sparse_tensor_module_names",
}
_OWN |= {
    "dp_world_size",
    "mp_world_size",
    "data_sampler",
    "random_ltd",
    "global_steps",
    "skipped_steps",
    "global_samples",
}


@FORMATS.add("ds-universal")
class DeepSpeedUniversal(Format):
    name: ClassVar[str] = "ds-universal"
    title: ClassVar[str] = "DeepSpeed universal format"

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        zero = folder / ZERO
        return zero.is_dir() and any((p / "fp32.pt").is_file() for p in zero.iterdir())

    @classmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        return _Folder(folder, reading).content()


@dataclass(frozen=True)
class _Saved:
    """A tensor of a file: where its values lie, in order."""

    file: str
    dtype: str
    size: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        rows, columns = as_matrix(self.size)
        return rows * columns


class _Folder:
    """A universal checkpoint. Reads no values but step counts."""

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading
        self.crc32: dict[str, tuple[tuple[int, int, int], ...]] = {}
        self.left_out: list[str] = []
        self._storages: Mapping[str, torch_zip.Stored] = {}  # of the file that was opened last
        self._module_storages: Mapping[str, torch_zip.Stored] = {}
        self._ranks = 0
        self.state, self.state_file = self._model_states()
        self.model = self._model()
        self.names = self._names()

    def content(self) -> Content:
        saved = {name: self._states(path) for name, path in self.names.items()}
        tensors, padded = self._tensors(saved)
        found: dict[tuple[str, bool], dict[str, Array]] = {}
        shapes = mapping.atom_shapes(self.model)
        parts: dict[tuple[str, bool, str], list[tuple[str, Place]]] = {}
        module = self._module(saved)
        for name, states in saved.items():
            for state, one in (states | ({MODEL: module[name]} if name in module else {})).items():
                columns = tensors[name].matrix[1]
                for atom, pad, place in places(tensors[name].fills, one.file, one.start, columns, one.dtype):
                    parts.setdefault((atom, pad, state), []).append((one.dtype, place))
        for (atom, pad, state), held in parts.items():
            shape = ((padded or 0) - self.model.vocab_size, *shapes[atom][1:]) if pad else shapes[atom]
            array = Array(held[0][0], shape, tuple(place for _, place in held))
            if why := why_not_tiled(array):
                raise UsageError(f"`{self.folder}`: of `{atom}` ({state}) {why}")
            found.setdefault((atom, pad), {})[state] = array
        self._check_all(found, shapes)
        dtype = self._dtype(found)
        wanted = OPTIMIZER if self.reading.optimizer else (MAIN,)
        atoms = {}
        for name, shape in shapes.items():
            own = found[name, False].get(MODEL)
            kept = (MODEL,) if own is not None and not self.reading.optimizer else (MODEL, *wanted)
            atoms[name] = Atom(
                name=name,
                shape=shape,
                dtype=dtype if own is None else own.dtype,
                states={s: a for s, a in found[name, False].items() if s in kept},
                pad={s: a for s, a in found.get((name, True), {}).items() if s in kept},
            )
        if not self.reading.optimizer:
            self.left_out.append(LEFT_OPTIMIZER)
        return Content(
            format=DeepSpeedUniversal.name,
            path=self.folder,
            model=self.model,
            atoms=atoms,
            padded_vocab_size=padded,
            optimizer=self._optimizer() if self.reading.optimizer else None,
            iteration=self._iteration(),
            common=self._common(),
            left_out=tuple(self.left_out),
            crc32=self.crc32,
        )

    # --- files ---

    def _open(self, path: Path) -> Any:
        """The value of a file that torch saved; its checksums are kept."""
        file = os.fspath(path)
        with Files() as files:
            data = files.map(file)
            archive = torch_zip.read(data, 0, len(data), file)
        self.crc32[file] = tuple(sorted((s.start, s.length, s.crc32) for s in archive.storages.values()))
        self._storages = archive.storages
        return archive.value

    def _saved(self, record: Any, file: str, what: str) -> _Saved:
        """A tensor of the file that was opened last."""
        if not isinstance(record, TensorRecord):
            raise UsageError(f"`{file}`: {what} is not a tensor")
        dtype, storage = record.storage.dtype, self._storages.get(record.storage.key)
        expected, step = [], 1
        for length in reversed(record.size):
            expected.append(step)
            step *= length
        strides = zip(record.size, record.stride, reversed(expected), strict=True)
        if any(length > 1 and stride != wanted for length, stride, wanted in strides):
            raise UsageError(f"`{file}`: {what} is not stored row after row, which is not supported")
        size = itemsize(dtype)
        if storage is None or record.offset < 0 or (record.offset + step) * size > storage.length:
            raise UsageError(f"`{file}` was cut off: the values of {what} are not in it")
        return _Saved(file, dtype, record.size, storage.start + record.offset * size)

    def _states(self, folder: Path) -> dict[str, _Saved]:
        """Every state of a parameter."""
        found: dict[str, _Saved] = {}
        for state in OPTIMIZER if self.reading.optimizer else (MAIN,):
            path = folder / f"{state}.pt"
            if not path.is_file():
                raise UsageError(f"`{path}` is missing")
            value = self._open(path)
            record = value.get("param") if isinstance(value, dict) else value
            found[state] = self._saved(record, str(path), "`param`")
            if found[state].size != found[MAIN].size and found[state].numel != found[MAIN].numel:
                raise UsageError(
                    f"`{path}` has shape {list(found[state].size)}, `fp32.pt` has {list(found[MAIN].size)}"
                )
        if found[MAIN].dtype != "float32":
            raise UsageError(f"`{folder / 'fp32.pt'}` is {found[MAIN].dtype}, wanted float32")
        return found

    def _names(self) -> dict[str, Path]:
        """The folder of each parameter by its name without wrappers."""
        found: dict[str, Path] = {}
        for path in sorted(p for p in (self.folder / ZERO).iterdir() if p.is_dir()):
            name = path.name
            while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None):
                name = name.removeprefix(wrapper)
            if name in found:
                raise UsageError(f"`{found[name]}` and `{path}` are the same parameter")
            found[name] = path
        return found

    def _model_states(self) -> tuple[Mapping[str, Any], str]:
        """The first model_states file, and its name; nothing where there is none."""
        files = sorted(self.folder.glob("mp_rank_*_model_states.pt"))
        if not files:
            return {}, ""
        value = self._open(files[0])
        if not isinstance(value, dict):
            raise UsageError(f"`{files[0]}` does not hold a dictionary")
        self._module_storages = self._storages
        self._ranks = len(files)
        return value, str(files[0])

    # --- the model ---

    def _model(self) -> ModelConfig:
        given = self.reading.config or next(
            (f for f in (self.folder, self.folder / "hf", self.folder.parent) if (f / "config.json").is_file()), None
        )
        if given is None:
            raise UsageError(
                f"`{self.folder}` does not say what its model is",
                "name the Hugging Face folder that it started from: `--config HF_DIR`",
            )
        model = hf_config.read_config(given)
        info = self.state.get("universal_checkpoint_info")
        original = info.get("original_vocab_size") if isinstance(info, dict) else None
        wanted = self.reading.vocab_size or model.vocab_size
        if isinstance(original, int) and original != wanted:
            raise UsageError(
                f"`{self.state_file}` says `original_vocab_size` {original}, "
                f"{'`--vocab-size`' if self.reading.vocab_size else f'`{given}`'} says {wanted}"
            )
        return dataclasses.replace(model, vocab_size=wanted)

    def _tensors(self, saved: Mapping[str, Mapping[str, _Saved]]) -> tuple[dict[str, Tensor], int | None]:
        """What each parameter is made of, and the rows of the vocabulary where they are padded."""
        model = self.model
        plain = mapping.hf_tensors(model)
        fused = mapping.megatron_tensors(model)
        vocabulary = {str(f.atom) for k in mapping.VOCABULARY if k in fused for f in fused[k].tensor.fills}
        known: dict[str, Tensor] = {key: f.tensor for key, f in fused.items()}
        for spec in layouts.SPECS:
            known |= {layouts.local_name(model, key, spec): f.tensor for key, f in fused.items()}
        known |= plain
        tied = mapping.tied_copy(model)
        made: dict[str, Tensor] = {}
        padded: int | None = None
        for name in list(saved):
            states = saved[name]
            if tied is not None and name in (tied[0], mapping.OUTPUT):
                self._drop_copy(name, saved, tied[1])
                continue
            if name not in known:
                raise UsageError(
                    f"`{self.names[name]}`: no rule of `{model.family}` names this parameter"
                    f"{mapping.suggest(name, known)}"
                )
            tensor = known[name]
            rows, columns = tensor.matrix
            numel, shape = states[MAIN].numel, states[MAIN].size
            is_vocabulary = {f.atom for f in tensor.fills} <= vocabulary
            extra = numel // columns - rows if is_vocabulary and numel % columns == 0 else 0
            if extra > 0:
                if padded not in (None, rows + extra):
                    raise UsageError(f"`{self.names[name]}` has {rows + extra} rows, another vocabulary {padded}")
                padded = rows + extra
                fill = Fill(tensor.fills[0].atom, rows, extra, 0, columns, pad=True)
                tensor = Tensor(tensor.key, (padded, columns), (*tensor.fills, fill))
            if shape != tensor.shape and shape != (tensor.numel,):
                raise UsageError(
                    f"`{self.names[name]}` has shape {list(shape)}, the configuration says {list(known[name].shape)}"
                )
            made[name] = tensor
        return made, padded

    def _drop_copy(self, name: str, saved: Any, kept: str) -> None:
        """Leave out an output layer that is the embedding; refuse one that is not."""
        mine = saved.pop(name)
        other = saved.get(kept) or saved.get(mapping.EMBEDDING)
        if other is None:
            raise UsageError(f"`{self.folder}` has no `{kept}`, to which `{name}` is tied")
        with Files() as files:
            for state, one in mine.items():
                count = one.numel
                if other[state].numel == count:
                    placed = [
                        [("", False, Place(o.file, o.start, count * itemsize(o.dtype), 0, 1, 0, count))]
                        for o in (other[state], one)
                    ]
                    count, _ = differences(files, one.dtype, *placed)
                if count:
                    raise UsageError(
                        f"`{self.names[name]}` ({state}) differs from `{kept}` in {count:,} values, "
                        "but the configuration ties them"
                    )
        self.left_out.append(f"`{name}`, a copy of `{kept}`")

    def _check_all(self, found: Mapping[tuple[str, bool], Any], shapes: Mapping[str, Any]) -> None:
        missing = [name for name in shapes if (name, False) not in found]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UsageError(f"`{self.folder / ZERO}` has no parameter for `{missing[0]}`{more} of the model")

    def _module(self, saved: Mapping[str, Mapping[str, _Saved]]) -> dict[str, _Saved]:
        """Weights of the module by name, if one rank's file holds all of them in the same shapes."""
        module = self.state.get("module")
        if not isinstance(module, dict) or self._ranks > 1:
            return {}
        self._storages = self._module_storages
        found: dict[str, _Saved] = {}
        for key, record in module.items():
            name = str(key)
            while wrapper := next((w for w in _WRAPPERS if name.startswith(w)), None):
                name = name.removeprefix(wrapper)
            if name in saved and isinstance(record, TensorRecord) and record.storage.dtype in CARRIERS:
                found[name] = self._saved(record, self.state_file, f"`{key}`")
        whole = all(name in found and found[name].size == states[MAIN].size for name, states in saved.items())
        return found if whole else {}

    def _dtype(self, found: Mapping[tuple[str, bool], Mapping[str, Array]]) -> str:
        """Of the model's weights, where the module is not there whole."""
        module = self.state.get("module")
        records = module.values() if isinstance(module, dict) else ()
        dtypes = [r.storage.dtype for r in records if isinstance(r, TensorRecord) and r.storage.dtype in CARRIERS]
        if dtypes:
            return max(set(dtypes), key=dtypes.count)
        return hf_config.source_dtype(self.model)

    # --- everything else ---

    def _optimizer(self) -> Optimizer:
        steps = {self._step(path / STEP): path / STEP for path in self.names.values() if (path / STEP).is_file()}
        groups = []
        path = self.folder / ZERO / GROUPS
        if path.is_file():
            value = self._open(path)
            for group in value.get("param_groups", ()) if isinstance(value, dict) else ():
                kept = {k: v for k, v in group.items() if k != "params"}
                if isinstance(kept.get("step"), int):
                    steps.setdefault(kept.pop("step"), path)
                groups.append(unpickle.plain({k: v for k, v in kept.items() if unpickle.is_plain(v)}))
        if len(steps) > 1:
            (a, first), (b, second) = list(steps.items())[:2]
            raise UsageError(f"`{first}` says step {a}, `{second}` says {b}")
        if not steps:
            iteration = self._iteration()
            if iteration is None:
                raise UsageError(f"`{self.folder}` does not say how many updates the optimizer has made")
            self.left_out.append(f"the number of updates, which is not there: taken is the iteration, {iteration}")
            steps = {iteration: self.folder}
        return Optimizer(step=next(iter(steps)), groups=tuple(groups))

    def _step(self, path: Path) -> int:
        value = self._open(path)
        value = value.get("param") if isinstance(value, dict) else value
        if isinstance(value, TensorRecord):
            saved = self._saved(value, str(path), "the step")
            with Files() as files:
                view = files.view(Place(saved.file, saved.start, itemsize(saved.dtype), 0, 1, 0, 1), saved.dtype)
                value = view[0, 0].item()
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
            raise UsageError(f"`{path}` is no number of updates: {value!r}")
        return int(value)

    def _iteration(self) -> int | None:
        for name in ("iteration", "global_steps"):
            if isinstance(self.state.get(name), int):
                return int(self.state[name])
        digits = self.folder.name.removeprefix("global_step").removesuffix("_universal")
        return int(digits) if digits.isdigit() else None

    def _common(self) -> dict[str, Any]:
        kept = {}
        for key, value in self.state.items():
            if isinstance(key, str) and key not in _OWN and value is not None:
                try:
                    kept[key] = unpickle.plain(value)
                except TypeError as error:
                    self.left_out.append(f"`{key}`: {error}")
        return kept
