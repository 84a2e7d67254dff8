"""Megatron's own folders (`--ckpt-format torch`): one file for each model-parallel rank, tensors as the rank has them.

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt   tensor, pipeline, expert rank; numbers of axes of one rank are absent
    mp_rank_TT[_PPP][_EEE]/distrib_optim.pt     optimizer state of the distributed optimizer, flat (see `buckets`)

`model_optim_rng.pt` is a dictionary of `args`, `checkpoint_version`, `iteration`, `model` (`model0`, `model1`, ... with
virtual pipeline chunks), `optimizer`, `opt_param_scheduler`, `rng_state`. Names are the module's own, layers numbered
from 0 in each chunk; how many layers a chunk has is what its names show.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, buckets, layouts, mapping, megatron_args, torch_zip, unpickle
from cpt.checkpoint.arrays import Array, Files
from cpt.checkpoint.content import MAIN, MODEL, MOMENTS, OPTIMIZER, Atom, Content, Layout, Optimizer
from cpt.checkpoint.copies import Parts, Placed
from cpt.checkpoint.formats import FORMATS, Format, Output, Reading, Writing
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.mapping import EMBEDDING, OUTPUT
from cpt.checkpoint.torch_zip import Archive
from cpt.checkpoint.unpickle import TensorRecord
from cpt.plan.types import ModelConfig

FILE, DISTRIBUTED = "model_optim_rng.pt", "distrib_optim.pt"
SCHEDULER = "opt_param_scheduler"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model\d*")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_RANDOM = ("rng_state", "rerun_state_machine", "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state")
_AXES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
}


@FORMATS.add("megatron")
class Megatron(Format):
    name: ClassVar[str] = "megatron"

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        return folder.is_dir() and any(_RANK.fullmatch(p.name) for p in folder.glob("mp_rank_*"))

    @classmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        reader = _Reader(folder, reading)
        try:
            return reader.content()
        finally:
            reader.files.close()

    @classmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        from cpt.checkpoint.formats.megatron_writing import plan

        return plan(content, writing)

    @classmethod
    def facts(cls, folder: Path) -> Mapping[str, Any]:
        folders = sorted(p for p in folder.glob("mp_rank_*") if _RANK.fullmatch(p.name))
        return {
            "rank folders": len(folders),
            "distributed optimizer": any((p / DISTRIBUTED).is_file() for p in folders),
        }


def rank_folder(layout: Layout, tp: int, pp: int, ep: int) -> str:
    """Name of a rank's folder."""
    name = f"mp_rank_{tp:02d}"
    name += f"_{pp:03d}" if layout.pp > 1 else ""
    return name + (f"_{ep:03d}" if layout.ep > 1 else "")


@dataclass(frozen=True)
class _Rank:
    """A rank's file."""

    tp: int
    pp: int
    ep: int
    file: str
    archive: Archive
    chunks: tuple[Mapping[str, TensorRecord], ...]

    def __str__(self) -> str:
        return Path(self.file).parent.name


@dataclass(frozen=True)
class _Param:
    """A parameter that a rank holds."""

    held: Held
    record: TensorRecord

    @property
    def dtype(self) -> str:
        return self.record.storage.dtype


class _Reader:
    """One folder while it is opened."""

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading
        self.files = Files()
        self.parts = Parts(self.files, first_replica=reading.first_replica)
        self.crc32: dict[str, list[tuple[int, int, int]]] = {}
        self.left_out: list[str] = []
        self.steps: set[int] = set()
        self.groups: tuple[Mapping[str, Any], ...] = ()
        self.first: _Rank

    def content(self) -> Content:
        folders = self._folders()
        first = self._load(folders[min(folders)])
        self.args = _arguments(first.archive.value)
        self._check_version(first)
        layout = self._layout(folders, first)
        ranks = [
            first if rank == (0, 0, 0) else self._load(self.folder / rank_folder(layout, *rank), *rank)
            for rank in layouts.ranks(layout)
        ]
        self._check_same(ranks)
        where = f"{first}/{FILE}"
        model = megatron_args.to_model(self.args, where, self.reading.config, vocab_size=self.reading.vocab_size)
        layout = self._with_layers(layout, ranks, model, where)
        padded = self._padded(model, layout, first, where)
        layouts.check(model, layout, padded)
        params = [self._params(rank, model, layout, padded) for rank in ranks]
        for rank, of_rank in zip(ranks, params, strict=True):
            for param in of_rank:
                what = f"`{param.held.name}`"
                placed = self._placed(rank.file, rank.archive, param.record, param.held, what)
                self.parts.add(str(rank), param.held, rank.tp, MODEL, param.dtype, placed)
        optimizer = self._optimizer(ranks, params, model, layout, padded)
        atoms = self._atoms(model, padded, optimizer is not None)
        self._note(ranks)
        value = first.archive.value
        iteration = value.get("iteration")
        released = self.folder.name == "release" or not isinstance(iteration, int) or iteration <= 0
        return Content(
            format=Megatron.name,
            path=self.folder,
            model=model,
            atoms=atoms,
            padded_vocab_size=padded,
            optimizer=optimizer,
            iteration=None if released else iteration,
            common=self._common(value),
            args=self.args,
            objects={k: unpickle.plain(v) for k, v in value.items() if str(k).startswith("cpt.")},
            layout=layout,
            left_out=tuple(self.left_out),
            crc32={file: tuple(sorted(set(sums))) for file, sums in self.crc32.items()},
        )

    # --- which ranks there are ---

    def _folders(self) -> dict[tuple[int, ...], Path]:
        """Rank folders by their numbers."""
        found = {}
        for path in sorted(self.folder.glob("mp_rank_*")):
            match = _RANK.fullmatch(path.name)
            if match is None or not path.is_dir():
                continue
            found[tuple(int(n) for n in match.groups() if n is not None)] = path
        if not found:
            raise UsageError(f"`{self.folder}` has no folders `mp_rank_00…`")
        if len({len(numbers) for numbers in found}) > 1:
            names = ", ".join(f"`{p.name}`" for p in found.values())
            raise UsageError(f"`{self.folder}` holds ranks of several layouts: {names}")
        without = [p for p in found.values() if not (p / FILE).is_file()]
        if without:
            raise UsageError(f"`{without[0] / FILE}` is missing: the save never finished or the copy is incomplete")
        return found

    def _load(self, folder: Path, tp: int = 0, pp: int = 0, ep: int = 0) -> _Rank:
        file = os.fspath(folder / FILE)
        archive = self._archive(file)
        value = archive.value
        if not isinstance(value, dict):
            raise UsageError(f"`{file}` does not hold a Megatron checkpoint")
        keys = [k for k in value if isinstance(k, str) and _CHUNK.fullmatch(k)]
        wanted = ["model"] if keys == ["model"] else [f"model{i}" for i in range(len(keys))]
        if not keys or set(keys) != set(wanted):
            raise UsageError(f"`{file}` has no `model` (`model0`, `model1`, … with virtual pipeline chunks)")
        return _Rank(tp, pp, ep, file, archive, tuple(self._tensors(value[k], file) for k in wanted))

    def _archive(self, file: str) -> Archive:
        data = self.files.map(file)
        archive = torch_zip.read(data, 0, len(data), file)
        self.crc32[file] = [(s.start, s.length, s.crc32) for s in archive.storages.values()]
        return archive

    def _tensors(self, state: Any, file: str) -> dict[str, TensorRecord]:
        """The tensors of a module's state by name."""
        if not isinstance(state, dict):
            raise UsageError(f"`{file}`: the model's state is not a dictionary")
        if "language_model" in state or any(str(k).startswith("language_model.") for k in state):
            raise UsageError(
                f"`{file}` is of a model from before megatron-core (`language_model…`), which is not supported",
                "load and save it once with Megatron-LM's own converter",
            )
        strip = "module." if state and all(str(k).startswith("module.") for k in state) else ""
        found: dict[str, TensorRecord] = {}
        scales = 0
        for key, value in state.items():
            name = str(key).removeprefix(strip)
            if name.endswith("_extra_state"):
                scales += value is not None
            elif isinstance(value, TensorRecord):
                found[name] = value
            elif value is not None:
                raise UsageError(f"`{file}`: `{name}` is not a tensor")
        if scales:
            self.left_out.append(f"{scales} `_extra_state` entries of layers in `{Path(file).parent.name}`")
        return found

    def _check_version(self, first: _Rank) -> None:
        version = first.archive.value.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or version < 2:
            raise UsageError(
                f"`{first.file}` has `checkpoint_version` {version}: before 2.0 queries, keys and values were stored "
                "in another order, which is not supported",
                "load and save it once with Megatron-LM, which reorders them",
            )

    def _layout(self, folders: Mapping[tuple[int, ...], Path], first: _Rank) -> Layout:
        """Sizes of the layout, as the arguments say and the folders bear out.

        Raises:
            UsageError: they disagree, or ranks are missing.
        """
        sizes = {axis: self._size(name) for axis, name in _AXES.items()}
        if self.args.get(_AXES["tp"]) is None and len(min(folders)) == 1:
            sizes["tp"] = 1 + max(n[0] for n in folders)
        etp = self.args.get("expert_tensor_parallel_size")
        if self.args.get("num_experts") and isinstance(etp, int) and etp != sizes["tp"]:
            raise UsageError(
                f"`{first.file}`: experts with tensor ranks of their own (`expert_tensor_parallel_size` {etp}, tp "
                f"{sizes['tp']}) are not supported in this format"
            )
        layout = Layout(
            tp=sizes["tp"],
            pp=sizes["pp"],
            ep=sizes["ep"],
            vp=len(first.chunks),
            dp=self._size("data_parallel_size"),
        )
        wanted = {rank_folder(layout, *rank) for rank in layouts.ranks(layout)}
        there = {p.name for p in folders.values()}
        if wanted == there:
            return layout
        claimed = f"the arguments in `{first}/{FILE}` claim {layout} ({len(wanted)} ranks)"
        counts = [1 + max(axis) for axis in zip(*folders, strict=True)]
        details = [f"there: {_listed(there)}"]
        if wanted - there:
            details.append(f"missing: {_listed(wanted - there)}")
        if there - wanted:
            details.append(f"of another layout: {_listed(there - wanted)}")
        whole = 1
        for count in counts:
            whole *= count
        if whole == len(there):
            of = dict(zip(("tp", "pp" if sizes["pp"] > 1 or sizes["ep"] == 1 else "ep", "ep"), counts, strict=False))
            claimed += ", the folders are those of " + " × ".join(f"{axis} {n}" for axis, n in of.items())
        raise UsageError(f"`{self.folder}`: {claimed}; {'; '.join(details)}")

    def _size(self, name: str) -> int:
        value = self.args.get(name)
        return value if isinstance(value, int) and value > 0 else 1

    def _check_same(self, ranks: Sequence[_Rank]) -> None:
        """Refuse files of different saves."""
        first = ranks[0]
        for rank in ranks[1:]:
            mine, theirs = first.archive.value, rank.archive.value
            for key in ("iteration", "checkpoint_version"):
                if mine.get(key) != theirs.get(key):
                    raise UsageError(
                        f"`{self.folder}` is made of several saves: `{key}` is {mine.get(key)} in `{first}`, "
                        f"{theirs.get(key)} in `{rank}`"
                    )
            args = _arguments(theirs)
            for axis, name in _AXES.items():
                if args.get(name) != self.args.get(name):
                    raise UsageError(
                        f"`{self.folder}` is made of several saves: {axis} (`{name}`) is {self.args.get(name)} in "
                        f"`{first}`, {args.get(name)} in `{rank}`"
                    )
            if len(rank.chunks) != len(first.chunks):
                raise UsageError(
                    f"`{first}` has {len(first.chunks)} virtual pipeline chunks, `{rank}` has {len(rank.chunks)}"
                )

    def _with_layers(self, layout: Layout, ranks: Sequence[_Rank], model: ModelConfig, where: str) -> Layout:
        """The layout with as many layers in each part as its names show."""
        by_stage = {rank.pp: rank for rank in reversed(ranks)}
        counts = []
        for chunk in range(layout.vp):
            for pp in range(layout.pp):
                seen = {int(m[1]) for name in by_stage[pp].chunks[chunk] if (m := _LAYER.match(name))}
                if seen != set(range(len(seen))):
                    gap = next(i for i in range(len(seen)) if i not in seen)
                    raise UsageError(f"`{by_stage[pp].file}` has no layer {gap}, and later ones are there")
                counts.append(len(seen))
        if sum(counts) != model.num_layers:
            raise UsageError(
                f"`{self.folder}`: the ranks hold {sum(counts)} layers ({', '.join(map(str, counts))}), the arguments "
                f"in `{where}` say {model.num_layers} (`num_layers`)"
            )
        even = len(set(counts)) == 1
        return Layout(
            tp=layout.tp,
            pp=layout.pp,
            ep=layout.ep,
            vp=layout.vp,
            dp=layout.dp,
            layers=None if even else tuple(counts),
        )

    # --- the model ---

    def _padded(self, model: ModelConfig, layout: Layout, first: _Rank, where: str) -> int:
        """Rows of the vocabulary, padding included."""
        record = first.chunks[0].get(EMBEDDING)
        if record is None or not record.size:
            raise UsageError(f"`{first.file}` has no tensor `{EMBEDDING}`")
        rows = record.size[0] * layout.tp
        said = self.args.get("padded_vocab_size")
        if said is not None and said != rows:
            raise UsageError(
                f"`{first.file}`: `{EMBEDDING}` has {record.size[0]} rows on {layout.tp} tensor ranks, so {rows}; the "
                f"arguments say {said} (`padded_vocab_size`)"
            )
        if rows < model.vocab_size:
            raise UsageError(
                f"`{first.file}`: `{EMBEDDING}` has {rows} rows on {layout.tp} tensor ranks, the vocabulary in the "
                f"arguments in `{where}` has {model.vocab_size}"
            )
        return rows

    def _params(self, rank: _Rank, model: ModelConfig, layout: Layout, padded: int) -> list[_Param]:
        """A rank's parameters in the order of registration, which is that of the names in its file.

        Raises:
            UsageError: one is missing, unknown, or has another shape than the arguments say.
        """
        stages = layouts.layers_of(layout, model.num_layers)
        params: list[_Param] = []
        used: list[set[str]] = [set() for _ in rank.chunks]
        for held in layouts.held(model, layout, padded, tp=rank.tp, pp=rank.pp, ep=rank.ep):
            names = {held.name}
            if held.name != OUTPUT:
                start = stages[rank.pp, held.chunk].start
                names |= {
                    layouts.local_name(model, held.key, spec, first_layer=start, layout=layout)
                    for spec in layouts.SPECS
                }
            chunk = rank.chunks[held.chunk]
            there = [name for name in sorted(names) if name in chunk]
            if len(there) != 1:
                if there:
                    raise UsageError(f"`{rank.file}` has `{there[0]}` twice: as `{there[1]}` too")
                raise UsageError(f"`{rank.file}` has no tensor `{held.name}`{mapping.suggest(held.name, chunk)}")
            record = chunk[there[0]]
            if tuple(record.size) != held.tensor.shape:
                raise UsageError(
                    f"`{rank.file}`: `{there[0]}` has shape {list(record.size)}, the arguments give "
                    f"{list(held.tensor.shape)} on one of {layout.tp} tensor ranks"
                )
            used[held.chunk].add(there[0])
            own = Held(held.chunk, there[0], held.key, held.tensor, held.copied)
            params.append(_Param(own, record))
        for chunk, names in zip(rank.chunks, used, strict=True):
            for name in chunk:
                if name not in names and not mapping.IGNORED.match(name):
                    known = {p.held.name: None for p in params}
                    raise UsageError(
                        f"`{rank.file}`: `{name}` is no tensor of a `{model.family}` model as the arguments describe it"
                        f"{mapping.suggest(name, known)}"
                    )
        order = [{name: i for i, name in enumerate(chunk)} for chunk in rank.chunks]
        return sorted(params, key=lambda p: (p.held.chunk, order[p.held.chunk][p.held.name]))

    def _placed(self, file: str, archive: Archive, record: TensorRecord, held: Held, what: str) -> list[Placed]:
        """Where a tensor's values lie."""
        if tuple(record.size) != held.tensor.shape:
            raise UsageError(
                f"`{file}`: {what} has shape {list(record.size)}, the model's tensor has {list(held.tensor.shape)}"
            )
        start = _start(file, archive, record, what)
        columns = held.tensor.matrix[1]
        return list(arrays.places(held.tensor.fills, file, start, columns, record.storage.dtype))

    def _atoms(self, model: ModelConfig, padded: int, optimizer: bool) -> dict[str, Atom]:
        """Every logical tensor, each state whole.

        Raises:
            UsageError: values are missing.
        """
        wanted = (MODEL, *(OPTIMIZER if optimizer else ()))
        made = {}
        for name, shape in mapping.atom_shapes(model).items():
            both: list[dict[str, Array]] = []
            for pad, of in ((False, shape), (True, (padded - model.vocab_size, *shape[1:]))):
                states = {}
                for state in self.parts.states(name, pad=pad):
                    array = self.parts.array(state, name, of, pad=pad)
                    assert array is not None
                    why = arrays.why_not_tiled(array)
                    if why is not None:
                        raise UsageError(f"`{self.folder}`: of `{name}` ({state}) {why}")
                    states[state] = array
                if optimizer and MODEL in states and states[MODEL].dtype == "float32":
                    states.setdefault(MAIN, states[MODEL])
                both.append(states)
            states, padding = both
            for state in wanted:
                if state not in states:
                    raise UsageError(f"`{self.folder}`: `{name}` has no `{state}`")
            made[name] = Atom(name=name, shape=shape, dtype=states[MODEL].dtype, states=states, pad=padding)
        return made

    # --- the optimizer ---

    def _optimizer(
        self,
        ranks: Sequence[_Rank],
        params: Sequence[Sequence[_Param]],
        model: ModelConfig,
        layout: Layout,
        padded: int,
    ) -> Optimizer | None:
        there = [rank for rank in ranks if rank.archive.value.get("optimizer") is not None]
        if not there or not self.reading.optimizer:
            if there:
                self.left_out.append("optimizer state")
            return None
        if len(there) < len(ranks):
            missing = next(rank for rank in ranks if rank not in there)
            raise UsageError(f"`{missing.file}` has no `optimizer`, `{there[0]}` has one")
        apart = layout.ep > 1 and model.num_experts > 0
        form = "plain"
        for rank, of_rank in zip(ranks, params, strict=True):
            stored = _chained(rank.archive.value["optimizer"])
            if len(stored) != 1 + apart:
                raise UsageError(
                    f"`{rank.file}` has the state of {len(stored)} optimizers, a model with"
                    f"{'' if apart else 'out'} expert ranks has {1 + apart}"
                )
            groups: list[Mapping[str, Any]] = []
            flat: list[tuple[int, list[_Param]]] = []
            for chain, one in enumerate(stored):
                of_chain = [p for p in of_rank if not apart or p.held.is_expert == (chain == 1)]
                what = f"`{rank.file}`, optimizer {chain}" if apart else f"`{rank.file}`"
                inner = one.get("optimizer", one)
                if not isinstance(inner, dict) or not isinstance(inner.get("param_groups"), list):
                    raise UsageError(f"{what}: the optimizer's state has no `param_groups`")
                groups += self._note_groups(inner["param_groups"])
                if "grad_scaler" in one:
                    self.left_out.append(f"the state of the loss scaler in `{rank}`")
                if inner.get("state"):
                    self._plain(rank, one, inner, of_chain, apart, what)
                elif of_chain:
                    flat.append((chain, of_chain))
            self.groups = self.groups or tuple(groups)
            if flat:
                form = "dp_reshardable"
                self._distributed(rank, flat, model, layout, padded, apart)
        if len(self.steps) != 1:
            said = ", ".join(map(str, sorted(self.steps))) or "no number"
            raise UsageError(f"`{self.folder}`: the optimizer's states do not say one count of updates, but {said}")
        self.left_out += self.parts.overridden
        return Optimizer(step=next(iter(self.steps)), groups=self.groups, form=form)

    def _note_groups(self, groups: Sequence[Any]) -> list[Mapping[str, Any]]:
        found = []
        for group in groups:
            step = group.get("step")
            if isinstance(step, int | float) and step == int(step):
                self.steps.add(int(step))
            found.append(unpickle.plain({k: v for k, v in group.items() if k not in ("params", "step")}))
        return found

    def _plain(
        self,
        rank: _Rank,
        outer: Mapping[str, Any],
        inner: Mapping[str, Any],
        params: Sequence[_Param],
        apart: bool,
        what: str,
    ) -> None:
        """State of an ordinary optimizer: by the number of the parameter in the groups."""
        groups, state = inner["param_groups"], inner["state"]
        mains = outer.get("fp32_from_fp16_params", outer.get("fp32_from_fp16"))
        if mains is not None and len(mains) != len(groups):
            raise UsageError(f"{what}: {len(mains)} groups of fp32 weights for {len(groups)} parameter groups")
        for i, (group, members) in enumerate(zip(groups, _members(groups, state, params, what), strict=True)):
            halves = [p for p in members if p.dtype != "float32"]
            given = list(mains[i]) if mains is not None else []
            if len(given) != len(halves):
                raise UsageError(
                    f"{what}: parameter group {i} has fp32 weights of {len(given)} parameters "
                    f"(`fp32_from_fp16_params`), wanted are {len(halves)}"
                )
            main_of = iter(given)
            for number, param in zip(group["params"], members, strict=True):
                name = param.held.name
                if number not in state:
                    raise UsageError(f"{what}: the optimizer has no state of `{name}` (number {number})")
                tensors = {m: state[number].get(m) for m in MOMENTS}
                if param.dtype != "float32":
                    tensors[MAIN] = next(main_of)
                self._count(rank, state[number].get("step"))
                for key, record in tensors.items():
                    label = f"{key} of `{name}`"
                    if not isinstance(record, TensorRecord):
                        raise UsageError(f"{what}: there is no {label}")
                    buckets.require_float32(record.storage.dtype, key, f"{what}: {label}")
                    placed = self._placed(rank.file, rank.archive, record, param.held, label)
                    self.parts.add(str(rank), param.held, rank.tp, key, "float32", placed)

    def _count(self, rank: _Rank, step: Any) -> None:
        """Take in a parameter's own step, a number or a tensor of one value."""
        if isinstance(step, TensorRecord):
            start = _start(rank.file, rank.archive, step, "`step`")
            place = arrays.Place(rank.file, start, 0, 0, 1, 0, 1)
            found = arrays.convert(self.files.view(place, step.storage.dtype), step.storage.dtype, "float64")
            step = float(found[0, 0])
        if isinstance(step, int | float):
            self.steps.add(int(step))

    def _distributed(
        self,
        rank: _Rank,
        chains: Sequence[tuple[int, Sequence[_Param]]],
        model: ModelConfig,
        layout: Layout,
        padded: int,
        apart: bool,
    ) -> None:
        """State of the distributed optimizer: flat buffers in a file of their own."""
        path = Path(rank.file).with_name(DISTRIBUTED)
        if not path.is_file():
            raise UsageError(
                f"`{path}` is missing: it holds the optimizer state of the distributed optimizer",
                "`--optimizer none` converts the weights alone",
            )
        file = os.fspath(path)
        archive = self._archive(file)
        stored = _chained(archive.value)
        shapes = mapping.atom_shapes(model)

        @cache
        def weights(atom: str, pad: bool) -> Array | None:
            shape = (padded - model.vocab_size, *shapes[atom][1:]) if pad else shapes[atom]
            return self.parts.array(MODEL, atom, shape, pad=pad)

        for chain, params in chains:
            entry = stored[chain] if chain < len(stored) else None
            if entry is None:
                if chain == 0 and rank.ep > 0:
                    continue  # saved by the first expert rank
                raise UsageError(f"`{file}` holds no state of optimizer {chain}")
            if not isinstance(entry, Mapping):
                raise UsageError(f"`{file}` does not hold a distributed optimizer's state")
            if not entry.get("buckets_coalesced"):
                raise UsageError(
                    f"`{file}` was written by Megatron of before February 2024 (no `buckets_coalesced`): not supported"
                )
            dtypes = {p.held.key: p.dtype for p in params}
            made = buckets.buffers(model, layout, [p.held for p in params], pp=rank.pp, dtype_of=dtypes.__getitem__)
            numbers = sorted(k for k in entry if isinstance(k, int))
            if len(numbers) != len(made):
                raise UsageError(f"`{file}` has {len(numbers)} gradient buffers, the model on `{rank}` has {len(made)}")
            for buffer, number in zip(made, numbers, strict=True):
                what = f"`{file}`, buffer {number}"
                flats = _flats(file, archive, entry[number], buffer, what)
                self._note_gradients(entry[number])
                for slot in buckets.search(buffer, flats, weights, self.files, what):
                    for state, flat in flats.items():
                        placed = [(a, p, q) for _, a, p, q in buckets.places([slot], 0, flat)]
                        self.parts.add(str(rank), slot.held, rank.tp, state, flat.dtype, placed)

    def _note_gradients(self, entry: Mapping[Any, Any]) -> None:
        """Let the arguments say what dtype gradients had, where they do not."""
        ((dtypes, _),) = entry.items()
        if self.args.get("accumulate_allreduce_grads_in_fp32") is None and str(dtypes[0]) == "bfloat16":
            self.args.setdefault("grad_reduce_in_bf16", str(dtypes[1]) == "bfloat16")

    # --- everything else ---

    def _common(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        known = {"args", "checkpoint_version", "iteration", "optimizer", *_RANDOM}
        kept = {}
        for key, held in value.items():
            if not isinstance(key, str) or key in known or _CHUNK.fullmatch(key) or key.startswith("cpt."):
                continue
            try:
                kept[key] = unpickle.plain(held)
            except TypeError as error:
                self.left_out.append(f"`{key}`: {error}")
        return kept

    def _note(self, ranks: Sequence[_Rank]) -> None:
        random = sum(any(rank.archive.value.get(k) is not None for k in _RANDOM) for rank in ranks)
        if random:
            self.left_out.append(f"random states of {random} ranks: they belong to the layout that saved them")


def _arguments(value: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments, plain ones only."""
    stated = value.get("args")
    given = stated if isinstance(stated, dict) else unpickle.fields(stated)
    return dict(unpickle.plain(given))


def _chained(value: Any) -> list[Any]:
    """State of one or of several optimizers as a list."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, dict) and value and all(isinstance(k, int) for k in value):
        return [value[k] for k in sorted(value)]
    return [value]


def _start(file: str, archive: Archive, record: TensorRecord, what: str) -> int:
    """Where a tensor's values start in a file [bytes].

    Raises:
        UsageError: they are not one after another, or lie outside their storage.
    """
    size = arrays.itemsize(record.storage.dtype)
    stride, numel = 1, 1
    for length, given in zip(reversed(record.size), reversed(record.stride), strict=True):
        if length > 1 and given != stride:
            raise UsageError(f"`{file}`: the values of {what} do not lie one after another, which is not supported")
        stride *= length
        numel *= length
    stored = archive.storages.get(record.storage.key)
    if stored is None:
        raise UsageError(f"`{file}` is damaged: the values of {what} are not in it")
    start = record.offset * size
    if record.offset < 0 or start + numel * size > stored.length:
        raise UsageError(
            f"`{file}` is damaged: {what} needs {start + numel * size:,} bytes, its storage has {stored.length:,}"
        )
    return stored.start + start


def _flats(file: str, archive: Archive, entry: Any, buffer: buckets.Buffer, what: str) -> dict[str, buckets.Flat]:
    """The flat tensors of a buffer by state."""
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError(f"{what} has several dtypes, which is not supported")
    ((dtypes, tensors),) = entry.items()
    if str(dtypes[0]) != buffer.dtypes[0]:
        raise UsageError(f"{what} is of {dtypes[0]} parameters, the model's are {buffer.dtypes[0]}")
    flats = {}
    for state, name in buckets.STATES.items():
        record = tensors.get(name)
        if not isinstance(record, TensorRecord) or len(record.size) != 1:
            raise UsageError(f"{what}: `{name}` is not a flat tensor")
        buckets.require_float32(record.storage.dtype, state, f"{what}: `{name}`")
        numel = int(tensors.get("numel_unpadded", record.size[0]))
        if record.size[0] < numel:
            raise UsageError(f"{what}: `{name}` has {record.size[0]:,} values, `numel_unpadded` is {numel:,}")
        start = _start(file, archive, record, f"`{name}`")
        flats[state] = buckets.Flat("float32", numel, (buckets.Piece(0, numel, file, start),))
    return flats


def is_decayed(held: Held) -> bool:
    """Whether Megatron applies weight decay to a parameter: neither to vectors nor to biases."""
    return len(held.tensor.shape) > 1 and not held.key.endswith(".bias")


def _members(
    groups: Sequence[Any], state: Mapping[Any, Any], params: Sequence[_Param], what: str
) -> list[list[_Param]]:
    """Parameters of each group, in the order of registration.

    Groups do not name them: what they are told apart by is in the groups (weight decay, experts, a learning rate of
    their own for embeddings), and numbers and shapes of the states must agree.

    Raises:
        UsageError: they do not.
    """

    def decays(held: Held, norms: bool) -> bool:
        return is_decayed(held) or (norms and "_layernorm." in held.key and "self_attention" in held.key)

    def kind(group: Any) -> tuple[bool, bool, bool]:
        given = group.get("wd_mult")
        if given is None:
            shapes = [_shape(state, number) for number in group["params"]]
            decayed = any(len(shape) > 1 for shape in shapes)
        else:
            decayed = given != 0
        return decayed, bool(group.get("is_expert_parallel")), bool(group.get("is_decoupled_lr"))

    kinds = [kind(g) for g in groups]
    experts, decoupled = any(k[1] for k in kinds), any(k[2] for k in kinds)

    def divided(rule: int) -> list[list[_Param]]:
        made: list[list[_Param]] = [[] for _ in groups]
        for param in params:
            held = param.held
            edge = decoupled and held.key in (EMBEDDING, OUTPUT)
            own = (decays(held, rule == 1) or rule == 2, experts and held.is_expert, edge)
            if own in kinds:
                made[kinds.index(own)].append(param)
        return made

    for rule in range(3):  # as Megatron does; with `apply_wd_to_qk_layernorm`; all parameters in one group
        made = divided(rule)
        if all(
            [p.held.tensor.shape for p in members] == [_shape(state, n) for n in group["params"]]
            for group, members in zip(groups, made, strict=True)
        ):
            return made
    counts = ", ".join(str(len(g["params"])) for g in groups)
    raise UsageError(
        f"{what}: the optimizer's groups have {counts} parameters, the model's {len(params)} do not divide like that "
        "by weight decay and shape"
    )


def _shape(state: Mapping[Any, Any], number: Any) -> tuple[int, ...]:
    """Shape of a parameter as its first moment shows."""
    moment = state.get(number, {}).get(MOMENTS[0])
    return tuple(moment.size) if isinstance(moment, TensorRecord) else ()


def _listed(names: Iterable[str]) -> str:
    """Names in order, shortened when there are many."""
    ordered = sorted(names)
    shown = [f"`{n}`" for n in ordered[:8]]
    return ", ".join(shown) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")
