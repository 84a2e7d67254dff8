"""Megatron's own folders (`--ckpt-format torch`): one file for each model-parallel rank, tensors as the rank has them.

    mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt   tensor, pipeline, expert rank; numbers of axes of one rank are absent
    mp_rank_TT[_PPP][_EEE]/distrib_optim.pt     optimizer state of the distributed optimizer, flat (see `buckets`)

`model_optim_rng.pt` is a dictionary of `args`, `checkpoint_version`, `iteration`, `model` (`model0`, `model1`, ... with
virtual pipeline chunks), `optimizer`, `opt_param_scheduler`, `rng_state`. Names are the module's own, layers numbered
from 0 in each chunk; how many layers a chunk has is what its names show.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from cpt.base.errors import UsageError
from cpt.checkpoint import arrays, layouts, mapping, megatron_args, unpickle
from cpt.checkpoint.arrays import Array, Files
from cpt.checkpoint.content import LEFT_OPTIMIZER, MAIN, MODEL, OPTIMIZER, Atom, Content, Layout, Optimizer
from cpt.checkpoint.copies import Parts
from cpt.checkpoint.formats import FORMATS, Output, Reading, WritableFormat, Writing
from cpt.checkpoint.formats.megatron_files import (
    AXES,
    DISTRIBUTED,
    FILE,
    RANK,
    Folder,
    Param,
    Rank,
    arguments,
    rank_folder,
    why_not_whole,
)
from cpt.checkpoint.formats.megatron_optimizer import OptimizerReader
from cpt.checkpoint.layouts import Held
from cpt.checkpoint.mapping import EMBEDDING, OUTPUT
from cpt.checkpoint.unpickle import TensorRecord
from cpt.plan.model import ModelConfig

_CHUNK = re.compile(r"model\d*")
_SWAPPED = "files of ranks have changed places: take another copy of the checkpoint"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_RANDOM = ("rng_state", "rerun_state_machine", "random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state")


@FORMATS.add("megatron")
class Megatron(WritableFormat):
    name: ClassVar[str] = "megatron"
    title: ClassVar[str] = "Megatron's per-rank format"

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        return folder.is_dir() and any(RANK.fullmatch(p.name) for p in folder.glob("mp_rank_*"))

    @classmethod
    def open(cls, folder: Path, reading: Reading) -> Content:
        reader = _Reader(folder, reading)
        try:
            return reader.content()
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
            # A pickle can say anything; what is likely to be wrong is checked by name before.
            raise UsageError(
                f"`{folder}` is damaged, or its files do not hold what Megatron writes: {type(error).__name__}: {error}"
            ) from error
        finally:
            reader.files.close()

    @classmethod
    def why_not_whole(cls, folder: Path) -> str | None:
        return why_not_whole(folder)

    @classmethod
    def plan(cls, content: Content, writing: Writing) -> Output:
        from cpt.checkpoint.formats.megatron_writing import plan

        return plan(content, writing)

    @classmethod
    def facts(cls, folder: Path) -> Mapping[str, Any]:
        folders = sorted(p for p in folder.glob("mp_rank_*") if RANK.fullmatch(p.name))
        return {
            "rank folders": len(folders),
            "distributed optimizer": any((p / DISTRIBUTED).is_file() for p in folders),
        }


class _Reader:
    """One folder while it is opened."""

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading
        self.files = Files()
        self.parts = Parts(self.files, first_replica=reading.first_replica)
        self.opener = Folder(folder, self.files)
        self.left_out: list[str] = []

    def content(self) -> Content:
        folders = self._folders()
        first = self._load(folders[min(folders)])
        self.args = arguments(first.opened.archive.value)
        self._check_version(first)
        layout = self._layout(folders, first)
        ranks = [
            first if rank == (0, 0, 0) else self._load(self.folder / rank_folder(layout, *rank), *rank)
            for rank in layouts.ranks(layout)
        ]
        self._check_same(ranks)
        self._check_order(ranks)
        where = f"{first}/{FILE}"
        model = megatron_args.to_model(self.args, where, self.reading.config, vocab_size=self.reading.vocab_size)
        layout = self._with_layers(layout, ranks, model, where)
        padded = self._padded(model, layout, first, where)
        layouts.check(model, layout, padded)
        params = [self._params(rank, model, layout, padded) for rank in ranks]
        self._refuse_equal(ranks, params, layout)
        self._check_padding(ranks, params, layout, padded - model.vocab_size)
        for rank, of_rank in zip(ranks, params, strict=True):
            for param in of_rank:
                what = f"`{param.held.name}`"
                placed = rank.opened.places(param.record, param.held, what)
                try:
                    self.parts.add(str(rank), param.held, rank.tp, MODEL, param.dtype, placed)
                except UsageError:
                    self.opener.refuse_damaged(*(r.file for r in ranks))
                    raise
        optimizer = self._optimizer(ranks, params, model, layout, padded)
        self.left_out += self.parts.overridden
        atoms = self._atoms(model, padded, optimizer is not None)
        self._note(ranks)
        value = first.opened.archive.value
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
            crc32=dict(self.opener.crc32),
        )

    # --- which ranks there are ---

    def _folders(self) -> dict[tuple[int, ...], Path]:
        """Rank folders by their numbers."""
        found = {}
        for path in sorted(self.folder.glob("mp_rank_*")):
            match = RANK.fullmatch(path.name)
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

    def _load(self, folder: Path, tp: int = 0, pp: int = 0, ep: int = 0) -> Rank:
        opened = self.opener.open(folder / FILE)
        file, value = opened.file, opened.archive.value
        if not isinstance(value, dict):
            raise UsageError(f"`{file}` does not hold a Megatron checkpoint")
        keys = [k for k in value if isinstance(k, str) and _CHUNK.fullmatch(k)]
        wanted = ["model"] if keys == ["model"] else [f"model{i}" for i in range(len(keys))]
        if not keys or set(keys) != set(wanted):
            raise UsageError(f"`{file}` has no `model` (`model0`, `model1`, … with virtual pipeline chunks)")
        return Rank(tp, pp, ep, opened, tuple(self._tensors(value[k], file) for k in wanted))

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

    def _check_version(self, first: Rank) -> None:
        version = first.opened.archive.value.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or version < 2:
            raise UsageError(
                f"`{first.file}` has `checkpoint_version` {version}: before 2.0 queries, keys and values were stored "
                "in another order, which is not supported",
                "load and save it once with Megatron-LM, which reorders them",
            )

    def _layout(self, folders: Mapping[tuple[int, ...], Path], first: Rank) -> Layout:
        """Sizes of the layout, as the arguments say and the folders bear out.

        Raises:
            UsageError: they disagree, or ranks are missing.
        """
        sizes = {axis: self._size(name) for axis, name in AXES.items()}
        if self.args.get(AXES["tp"]) is None and len(min(folders)) == 1:
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

    def _check_same(self, ranks: Sequence[Rank]) -> None:
        """Refuse files of different saves."""
        first = ranks[0]
        for rank in ranks[1:]:
            mine, theirs = first.opened.archive.value, rank.opened.archive.value
            for key in ("iteration", "checkpoint_version"):
                if mine.get(key) != theirs.get(key):
                    raise UsageError(
                        f"`{self.folder}` is made of several saves: `{key}` is {mine.get(key)} in `{first}`, "
                        f"{theirs.get(key)} in `{rank}`"
                    )
            args = arguments(theirs)
            for axis, name in AXES.items():
                if args.get(name) != self.args.get(name):
                    raise UsageError(
                        f"`{self.folder}` is made of several saves: {axis} (`{name}`) is {self.args.get(name)} in "
                        f"`{first}`, {args.get(name)} in `{rank}`"
                    )
            if len(rank.chunks) != len(first.chunks):
                raise UsageError(
                    f"`{first}` has {len(first.chunks)} virtual pipeline chunks, `{rank}` has {len(rank.chunks)}"
                )

    def _with_layers(self, layout: Layout, ranks: Sequence[Rank], model: ModelConfig, where: str) -> Layout:
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

    def _padded(self, model: ModelConfig, layout: Layout, first: Rank, where: str) -> int:
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

    def _params(self, rank: Rank, model: ModelConfig, layout: Layout, padded: int) -> list[Param]:
        """A rank's parameters in the order of registration, which is that of the names in its file.

        Raises:
            UsageError: one is missing, unknown, or has another shape than the arguments say.
        """
        stages = layouts.layers_of(layout, model.num_layers)
        params: list[Param] = []
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
            params.append(Param(own, record))
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

    def _refuse_equal(self, ranks: Sequence[Rank], params: Sequence[Sequence[Param]], layout: Layout) -> None:
        """Refuse ranks that are equal in all of which each has a part of its own: one file was copied over another.

        The checksums in the files say which may be equal; only the values of those are compared. Ranks of other
        layers or experts are not, unless both files say that one rank saved them: an untrained model may have the same
        values in all of them.
        """
        seen: dict[tuple[Any, ...], tuple[Rank, list[memoryview]]] = {}
        for rank, of_rank in zip(ranks, params, strict=True):
            own = [p for p in of_rank if not p.held.copied]
            crcs = {start: crc for start, _, crc in self.opener.crc32[rank.file]}
            data, values, key = memoryview(self.files.map(rank.file)), [], []
            for p in own:
                start = rank.opened.start(p.record, f"`{p.held.name}`")
                values.append(data[start : start + p.held.tensor.numel * arrays.itemsize(p.dtype)])
                key.append((p.held.name, len(values[-1]), crcs.get(start)))
            number = arguments(rank.opened.archive.value).get("rank")
            place = (number,) if isinstance(number, int) else (rank.pp, rank.ep)
            first, theirs = seen.setdefault((place, *key), (rank, values))
            if first is not rank and key and all(a == b for a, b in zip(theirs, values, strict=True)):
                raise UsageError(
                    f"`{self.folder}`: `{first}` and `{rank}` hold the same values in all {len(own):,} tensors of "
                    "which each rank has a part of its own: the file of one was copied over the other's",
                    "take another copy of the checkpoint, or an earlier step",
                )

    def _check_order(self, ranks: Sequence[Rank]) -> None:
        """Refuse files that changed places, by the number of the rank that saved each, where they say one: it grows
        with each of a rank's coordinates."""
        there: dict[tuple[int, ...], Rank] = {(r.tp, r.pp, r.ep): r for r in ranks}
        said = {at: arguments(r.opened.archive.value).get("rank") for at, r in there.items()}
        for at, rank in there.items():
            for axis in range(3):
                before = tuple(n - (i == axis) for i, n in enumerate(at))
                low, high = said.get(before), said[at]
                if isinstance(low, int) and isinstance(high, int) and low > high:
                    raise UsageError(
                        f"`{self.folder}`: `{there[before]}` was saved by rank {low} (`rank` in its arguments) and "
                        f"`{rank}` by rank {high}, which comes before it",
                        _SWAPPED,
                    )

    def _check_padding(
        self, ranks: Sequence[Rank], params: Sequence[Sequence[Param]], layout: Layout, pad_rows: int
    ) -> None:
        """Refuse files that changed places, by padding rows of the vocabulary that were never trained."""
        there = {(r.tp, r.pp, r.ep): r for r in ranks}
        blank: dict[int, bool] = {}  # of each tensor rank, whether its last rows are zero
        for rank, of_rank in zip(ranks, params, strict=True):
            for p in of_rank if rank.pp == rank.ep == 0 else ():
                rows, columns = p.held.tensor.matrix
                if p.held.name == EMBEDDING and 1 < pad_rows < rows:
                    size = pad_rows * columns * arrays.itemsize(p.dtype)
                    end = rank.opened.start(p.record, f"`{EMBEDDING}`") + p.held.tensor.numel * arrays.itemsize(p.dtype)
                    blank[rank.tp] = not any(self.files.map(rank.file)[end - size : end])
        if any(blank.values()) and not blank[layout.tp - 1]:
            other = there[next(tp for tp, is_blank in blank.items() if is_blank), 0, 0]
            raise UsageError(
                f"`{self.folder}`: `{other}` ends with {pad_rows} rows of zeros in `{EMBEDDING}`, as padding rows are, "
                f"and `{there[layout.tp - 1, 0, 0]}`, which has the padding rows, does not",
                _SWAPPED,
            )

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

    def _optimizer(
        self, ranks: Sequence[Rank], params: Sequence[Sequence[Param]], model: ModelConfig, layout: Layout, padded: int
    ) -> Optimizer | None:
        if not any(rank.opened.archive.value.get("optimizer") is not None for rank in ranks):
            return None
        if not self.reading.optimizer:
            self.left_out.append(LEFT_OPTIMIZER)
            return None
        shapes = mapping.atom_shapes(model)

        @cache
        def weights(atom: str, pad: bool) -> Array | None:
            shape = (padded - model.vocab_size, *shapes[atom][1:]) if pad else shapes[atom]
            return self.parts.array(MODEL, atom, shape, pad=pad)

        reader = OptimizerReader(self.opener, self.parts, model, layout, weights, self.args)
        found = reader.read(ranks, params)
        self.left_out += reader.left_out
        return found

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

    def _note(self, ranks: Sequence[Rank]) -> None:
        random = sum(any(rank.opened.archive.value.get(k) is not None for k in _RANDOM) for rank in ranks)
        if random:
            self.left_out.append(f"random states of {random} ranks: they belong to the layout that saved them")


def _listed(names: Iterable[str]) -> str:
    """Names in order, shortened when there are many."""
    ordered = sorted(names)
    shown = [f"`{n}`" for n in ordered[:8]]
    return ", ".join(shown) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")
