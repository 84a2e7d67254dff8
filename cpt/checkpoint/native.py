"""Our own checkpoints: an engine's whole state to a folder and back, at the same layout or another.

A folder holds Megatron's `torch_dist` format (see `torch_dist`) with the optimizer in model shapes
(`fully_reshardable`), random states as `cpt.rng.rank_<R>`, and `manifest.json`, written last. Foreign Megatron
checkpoints of that form load too.

Before every load and with every save the fp32 main weights, rounded to the model's dtype, are compared with the model's
weights: shifted, swapped or half-written optimizer state shows there at once.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import shutil
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import EnvironmentProblem, StageFailed, UsageError
from cpt.checkpoint import main_weights, megatron_args, states, torch_dist
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint.content import Layout
from cpt.checkpoint.manifest import Manifest, Origin
from cpt.checkpoint.ranks import Ranks, is_disk_full
from cpt.checkpoint.torch_dist import Chunk, Folder
from cpt.checkpoint.unpickle import Dtype

if TYPE_CHECKING:
    import torch

    from cpt.engine.ports import Engine, Progress

KEEP = frozenset({"weights", "optimizer", "rng"})
RNG = "cpt.rng.rank_{:05d}"


def save(
    engine: Engine,
    folder: str | os.PathLike[str],
    *,
    progress: Progress,
    phase: str = "train",
    origin: Origin | None = None,
) -> Manifest:
    """Write a whole checkpoint; returns when it is safe on disk. Called by all ranks.

    Raises:
        EnvironmentProblem: a rank cannot write. Nothing is left of the folder.
        StageFailed: main weights and model weights differ. Nothing is left of the folder.
    """
    begin_save(engine, Path(folder), progress=progress, phase=phase, origin=origin or Origin(), ranks=Ranks())()
    return manifests.read(folder)


def begin_save(
    engine: Engine,
    folder: Path,
    *,
    progress: Progress,
    phase: str,
    origin: Origin,
    ranks: Ranks,
    created: float = 0.0,
    asynchronous: bool = False,
    may_seal: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """Take everything that is to be saved and make room; the returned call writes it and must be made on all ranks.

    Args:
        asynchronous: nothing live is kept: training may go on before the call and during it, in another thread.
        may_seal: called on the first rank before the manifest is written; raises where that must not be.

    Raises:
        EnvironmentProblem: no room on the disk.
        StageFailed: the optimizer's main weights are not the model's.
    """
    with ranks.together() as sizes:
        chunks, objects = _collect(engine, copy=asynchronous)
        sizes.append(sum(c.data.numel() * c.data.itemsize + 2048 for c in chunks) + 2048 * len(objects))
    needed = sum(sizes)
    ranks.on_first(lambda: _prepare(folder, needed))
    draft = _draft(engine, progress, phase, origin, created, ranks.size)
    common = _common(engine, progress)

    def write() -> None:
        try:
            with ranks.together() as written:
                try:
                    if chunks or objects:
                        written.append(torch_dist.write_records(folder, f"__{ranks.rank}_0.distcp", chunks, objects))
                except OSError as error:
                    raise _write_error(folder, needed, error) from error
            ranks.on_first(lambda: _seal(folder, [w for w in written if w], common, draft, needed, may_seal))
        except Exception:
            # Not collective: ranks that are still here must not wait for one that is gone.
            if ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    return write


def _collect(engine: Engine, copy: bool) -> tuple[list[Chunk], dict[str, Any]]:
    """What this rank writes: its share of weights, main weights and moments, its random states, Megatron's objects."""
    from megatron.core import parallel_state

    all_places, objects = states.places(engine)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    chosen = states.owners(all_places, group.size())
    gathered = states.gather(engine, all_places, chosen) if engine.optimizer is not None else {}
    chunks: list[Chunk] = []
    for i, place in enumerate(all_places):
        if not place.is_main_copy or chosen[i] != group.rank():
            continue
        weight = place.parameter.detach()
        if copy:
            weight = weight.to("cpu", copy=True)
        chunks += _chunks(place.pieces(weight))
        for name, state in gathered.get(i, {}).items():
            if name == "param" and not main_weights.same_after_rounding(state, weight):
                raise StageFailed(
                    f"the optimizer's main weight of `{place.key}` is not the model's weight: nothing was saved",
                    "a method changed weights behind the optimizer's back, or memory is damaged",
                )
            chunks += _chunks(place.pieces(state, f"{states.PREFIX}{name}."))
    random_state = _random_state()
    shape = tuple(random_state.shape)
    chunks.append(Chunk(RNG.format(_rank()), shape, (0,), shape, random_state))
    return chunks, objects


def _chunks(pieces: list[Any]) -> list[Chunk]:
    return [
        Chunk(
            p.key,
            tuple(p.global_shape),
            tuple(p.global_offset),
            (1,) * p.prepend_axis_num + tuple(p.local_shape),
            p.data,
        )
        for p in pieces
    ]


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def _prepare(folder: Path, needed: int) -> None:
    """An empty folder with room for `needed` bytes."""
    from cpt.checkpoint.store import no_space, remove

    try:
        remove(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < needed * 1.01 + (1 << 16):
            raise no_space(folder, needed, free)
        folder.mkdir()
    except OSError as error:
        raise _write_error(folder, needed, error) from error


def _write_error(folder: Path, needed: int, error: OSError) -> EnvironmentProblem:
    from cpt.checkpoint.store import no_space

    if is_disk_full(error):
        return no_space(folder, needed, shutil.disk_usage(folder.parent).free)
    return EnvironmentProblem(
        f"cannot save `{folder}`: {(error.strerror or str(error)).lower()}",
        "the checkpoints saved before are still whole",
    )


def _seal(
    folder: Path,
    written: list[Any],
    common: dict[str, Any],
    draft: Manifest,
    needed: int,
    may_seal: Callable[[], None],
) -> None:
    try:
        records = [record for part, _ in written for record in part]
        files = {name: facts for _, part in written for name, facts in part.items()}
        files |= torch_dist.finish(folder, records, common)
        may_seal()
        manifests.write(folder, dataclasses.replace(draft, files=dict(sorted(files.items()))))
    except OSError as error:
        raise _write_error(folder, needed, error) from error


def _draft(engine: Engine, progress: Progress, phase: str, origin: Origin, created: float, ranks: int) -> Manifest:
    optimizer = None
    if engine.optimizer is not None:
        groups = [{k: v for k, v in g.items() if k != "step"} for g in states.hyperparameters(engine)]
        optimizer = {"step": states.step_of(engine), "groups": groups}
    return Manifest(
        origin=origin,
        model=engine.model,
        padded_vocab_size=engine.padded_vocab_size,
        precision=engine.precision,
        layout=engine.parallel,
        phase=phase,
        step=progress.step,
        tokens=progress.tokens,
        progress=dataclasses.asdict(progress),
        optimizer=optimizer,
        rng_ranks=ranks,
        versions=versions(),
        created=created,
    )


def versions() -> dict[str, str]:
    """Versions of everything that had a hand in a checkpoint."""
    from importlib.metadata import version

    import torch

    import cpt

    return {
        "cpt": cpt.__version__,
        "torch": str(torch.__version__),
        "megatron_core": version("megatron-core"),
        "python": platform.python_version(),
    }


def _common(engine: Engine, progress: Progress) -> dict[str, Any]:
    """What Megatron itself looks for beside the tensors."""
    import torch

    from cpt.engine import megatron

    model, layout = engine.model, engine.parallel
    layers = megatron.split_layers(model.num_layers, layout)
    args = megatron_args.to_args(
        model,
        layout=Layout(tp=layout.tp, pp=layout.pp, vp=layout.vp, dp=layout.dp, layers=layers),
        padded_vocab_size=engine.padded_vocab_size,
        dtype="bfloat16" if engine.precision == "bf16" else "float32",
        iteration=progress.step,
        spec="cpt",
    )
    args = {name: getattr(torch, value) if isinstance(value, Dtype) else value for name, value in args.items()}
    common: dict[str, Any] = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": progress.step}
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if engine.optimizer is not None:
        common["optimizer"] = {
            "optimizer": {"param_groups": states.hyperparameters(engine)},
            "param_state_sharding_type": "fully_reshardable",
        }
        content["distrib_optim_sharding_type"] = "fully_reshardable"  # type: ignore[assignment]
    common["content_metadata"] = content
    return common


def load(
    engine: Engine,
    folder: str | os.PathLike[str],
    *,
    keep: Collection[str] = KEEP,
    warn: Callable[[str], None] = lambda text: None,
) -> Progress:
    """Put a checkpoint's state into an engine of the same model at any layout. Called by all ranks.

    Args:
        keep: of weights, optimizer (moments and update count) and rng; other words of a recipe's `keep` are the
            caller's. Weights always include the fp32 main weights, so that a stage border rounds nothing.
        warn: called with one line on the first rank for what could not be kept.

    Returns:
        How far the checkpoint's stage was; of a foreign checkpoint only the step.

    Raises:
        UsageError: the folder is not whole, is of another model, or fails the main-weight check.
    """
    ranks = Ranks()
    folder = Path(folder)
    with ranks.together():
        source, manifest = open_folder(folder)
        optimizer = engine.optimizer is not None
        if optimizer and "optimizer" in keep and not main_weights.has_optimizer(source):
            raise UsageError(f"`{folder}` holds no optimizer state, but `keep` names `optimizer`")
        if optimizer:
            main_weights.check_main_weights(source, part=ranks.rank, parts=ranks.size)
        all_places, _ = states.places(engine)
        for place in all_places:
            check_shape(source, place)
    with ranks.together():
        _load_weights(engine, source, all_places)
        if optimizer:
            _load_optimizer(engine, source, all_places, moments="optimizer" in keep)
            states.set_step(engine, _step(source, manifest) if "optimizer" in keep else 0)
        if "rng" in keep:
            text = _load_random_state(engine, source, manifest)
            if text and ranks.rank == 0:
                warn(text)
    return _progress(source, manifest)


def open_folder(folder: Path) -> tuple[Folder, Manifest | None]:
    """A whole checkpoint's tensors and manifest (None for a foreign Megatron checkpoint).

    Raises:
        UsageError: it is not whole.
    """
    if not folder.is_dir():
        raise UsageError(f"`{folder}` is not a folder")
    if (folder / manifests.NAME).exists():
        why = manifests.why_not_whole(folder)
        if why is not None:
            raise UsageError(f"`{folder}` is not whole: {why}")
        return Folder(folder), manifests.read(folder)
    return Folder(folder), None


def check_shape(source: Folder, place: states.Place) -> None:
    """Refuse a checkpoint that lacks a parameter of an engine, or has it in another shape."""
    for piece in place.pieces(place.parameter.detach()):
        key, prepended = _find(source, piece)
        if key is None:
            raise UsageError(f"`{source.path}` has no tensor `{piece.key}`: it is of another model")
        expected = (
            tuple(piece.global_shape)[0 if prepended else 1 :] if piece.prepend_axis_num else tuple(piece.global_shape)
        )
        found = source.tensors[key].shape
        same = found[1:] == expected[1:] if place.is_vocabulary else found == expected
        if not same or len(found) != len(expected):
            raise UsageError(f"`{source.path}`: `{key}` has shape {list(found)}, the model wants {list(expected)}")


def _find(source: Folder, piece: Any, prefix: str = "") -> tuple[str | None, bool]:
    """(name of a piece's tensor in a checkpoint, whether its layers are stacked), for both of Megatron's spellings."""
    for start in (prefix, prefix.replace(".param.", ".fp32_param.")):
        if start + piece.key in source:
            return start + piece.key, True
        if piece.prepend_axis_num == 1:
            head, _, tail = piece.key.partition("layers.")
            single = f"{start}{head}layers.{piece.global_offset[0]}.{tail}"
            if single in source:
                return single, False
    return None, True


def _read(source: Folder, place: states.Place, prefix: str, out: torch.Tensor, start: int, end: int) -> None:
    """Fill elements `start` to `end` of `out` (a tensor of the parameter's shape) with what the checkpoint has there.

    Only the rows that hold these elements are read. Vocabulary rows beyond the stored padding become zero.
    """
    flat = out.view(-1)
    for piece in place.pieces(out):
        key, stacked = _find(source, piece, prefix)
        if key is None:
            raise UsageError(f"`{source.path}` has no tensor `{prefix}{piece.key}`")
        data, offset = piece.data, list(piece.global_offset)
        if not stacked:
            offset = offset[1:]
        axis = len(offset) - data.dim()
        rows = data.shape[0]
        if data.is_contiguous() and rows > 1:
            begin = data.storage_offset() - flat.storage_offset()
            width = data.numel() // rows
            first = max(0, (start - begin) // width)
            last = min(rows, -(-(end - begin) // width))
            if first >= last:
                continue
            data = data[first:last]
            offset[axis] += first
        if place.is_vocabulary:
            data.zero_()
        source.read_into(data, key, offset)


def _load_weights(engine: Engine, source: Folder, all_places: list[states.Place]) -> None:
    import torch

    with torch.no_grad():
        for place in all_places:
            read_weight(source, place, place.parameter.detach())


def read_weight(source: Folder, place: states.Place, out: torch.Tensor) -> None:
    """Fill `out`, of a parameter's shape, with its weight; in fp32 with the unrounded one where there is one."""
    import torch

    prefix = ""
    if out.dtype == torch.float32:
        # A bf16 checkpoint keeps fp32 main weights beside the rounded ones.
        main = f"{states.PREFIX}param."
        if _find(source, place.pieces(out)[0], main)[0] is not None:
            prefix = main
    _read(source, place, prefix, out, 0, out.numel())


def _load_optimizer(engine: Engine, source: Folder, all_places: list[states.Place], moments: bool) -> None:
    import torch

    by_id = {id(p.parameter): p for p in all_places}
    has_main = main_weights.has_main_weights(source)
    for parameter, local in states.local_states(engine):
        place = by_id[id(parameter)]
        for name, state in local.states.items():
            if name != "param" and not moments:
                state.zero_()
                continue
            prefix = "" if name == "param" and not has_main else f"{states.PREFIX}{name}."
            whole = torch.empty(parameter.shape, dtype=torch.float32)
            _read(source, place, prefix, whole, local.start, local.end)
            with torch.no_grad():
                state.copy_(whole.view(-1)[local.start : local.end])


def _step(source: Folder, manifest: Manifest | None) -> int:
    """Updates that the optimizer had made."""
    if manifest is not None:
        return int((manifest.optimizer or {}).get("step", 0))
    common = source.common()
    try:
        groups = common["optimizer"]["optimizer"]["param_groups"]
        return int(max(g["step"] for g in groups))
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"`{source.path / torch_dist.COMMON}` does not say how many updates were made") from None


def _progress(source: Folder, manifest: Manifest | None) -> Progress:
    from cpt.engine.ports import Progress

    if manifest is None:
        step = source.common().get("iteration", 0)
        return Progress(step=step if isinstance(step, int) else 0)
    known = {f.name for f in dataclasses.fields(Progress)}
    return Progress(**{k: v for k, v in manifest.progress.items() if k in known})


def _random_state() -> torch.Tensor:
    """Random states of Python, numpy, torch and Megatron's trackers on this rank, as bytes of a safetensors file."""
    import json
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from safetensors.torch import save as to_bytes

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    host = {"python": random.getstate(), "numpy": [kind, [int(k) for k in keys], position, has_gauss, gauss]}
    tensors = {"torch": torch.get_rng_state(), "device": torch.cuda.get_rng_state()}
    tensors |= {f"tracker.{name}": state for name, state in get_cuda_rng_tracker().get_states().items()}
    tensors["host"] = torch.frombuffer(bytearray(json.dumps(host).encode()), dtype=torch.uint8)
    data = to_bytes({name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()})
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _load_random_state(engine: Engine, source: Folder, manifest: Manifest | None) -> str | None:
    """Restore this rank's random states; the reason when they cannot be."""
    import json
    import random

    import numpy as np
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from safetensors.torch import load as from_bytes

    key = RNG.format(_rank())
    if manifest is None or key not in source:
        return "random states start anew: the checkpoint holds none"
    old, new = manifest.layout, engine.parallel
    if (old.tp, old.pp, old.dp, old.vp) != (new.tp, new.pp, new.dp, new.vp):
        was = f"tp {old.tp} × pp {old.pp} × dp {old.dp}"
        return f"random states start anew: they belong to the layout {was} of the checkpoint"
    tensors = from_bytes(bytes(source.read(key).numpy()))
    host = json.loads(bytes(tensors.pop("host").numpy()))
    version, state, gauss = host["python"]
    random.setstate((version, tuple(state), gauss))
    kind, keys, *rest = host["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors.pop("torch"))
    torch.cuda.set_rng_state(tensors.pop("device"))
    get_cuda_rng_tracker().set_states({name.removeprefix("tracker."): t for name, t in tensors.items()})
    return None


def tensors(folder: str | os.PathLike[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(Megatron name with one key a layer, whole tensor) of a checkpoint's model weights, one layer's tensor at a time.

    One process, no process group, no Megatron.
    """
    source, _ = open_folder(Path(folder))
    for name, part in stored(source):
        yield name, part.read(source)


@dataclass(frozen=True)
class Stored:
    """Where a weight lies: a tensor of the checkpoint, or one layer of it."""

    key: str
    layer: int | None = None

    def read(self, source: Folder, *, main: bool = False) -> torch.Tensor:
        """The weight; with `main` the unrounded one where the checkpoint has it."""
        key = self.key
        if main:
            key = next((prefix + key for prefix in main_weights.MAIN if prefix + key in source), key)
        if self.layer is None:
            return source.read(key)
        shape = source.tensors[key].shape
        return source.read(key, (self.layer, *[0] * (len(shape) - 1)), (1, *shape[1:]))[0]


def stored(source: Folder) -> Iterator[tuple[str, Stored]]:
    """(Megatron name with one key a layer, where it lies) of every model weight."""
    for key in source:
        head, stacked, tail = key.partition("layers.")
        if not is_weight(key):
            continue
        if not stacked or tail[:1].isdigit():
            yield key, Stored(key)
        else:
            for i in range(source.tensors[key].shape[0]):
                yield f"{head}layers.{i}.{tail}", Stored(key, i)


def is_weight(key: str) -> bool:
    """Whether a checkpoint's tensor is a model weight, not optimizer state or one of ours."""
    return not key.startswith(("optimizer.", "chained_", "cpt.", "rng_state"))
