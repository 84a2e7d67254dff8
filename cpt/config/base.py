"""What a checkpoint folder that a person names says about itself, read from its small files only."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt.base.errors import PlanError, UsageError
from cpt.base.files import canonical_json, hash_text, read_json, why_unreadable
from cpt.base.records import from_json
from cpt.base.registry import nearest
from cpt.plan.check import CONVERT_HINT, why_not_trained
from cpt.plan.model import ModelConfig
from cpt.plan.types import Conversion, Lr

if TYPE_CHECKING:
    from cpt.schedules.join import ParentLr

_SLICE = 1 << 16  # bytes read at each of a few places of a weight file
_PLACES = 16
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, or one that a conversion will make."""

    kind: str  # hf | native
    path: Path  # a Hugging Face folder, an `iter_*` folder, or the folder that a conversion makes
    identity: str
    model: ModelConfig
    tokenizer: Path | None = None  # folder or file; None: not beside the weights
    tokenizer_hash: str | None = None  # as the manifest says
    holds: tuple[str, ...] = ("weights",)  # what `keep` can take from it
    lr: ParentLr | None = None
    conversion: Conversion | None = None  # that makes `path` first


def find(
    text: str, at: int | str | None, format_: str, cwd: Path, runs: Path, cache: Path, config: str | None = None
) -> Checkpoint:
    """The checkpoint that a person named: a Hugging Face folder, a stage, a run, or a checkpoint of any known format.

    Args:
        text: as typed.
        at: a step, for a folder with several checkpoints.
        format_: auto, or what the folder must be.
        cwd: what a relative path is relative to.
        runs: folder of runs, for the name of a run.
        cache: where a checkpoint of another format is converted to.
        config: Hugging Face folder that says what the model of a Megatron checkpoint is.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    path = (cwd / Path(text).expanduser()).resolve()
    if not path.is_dir() and "/" not in text and (runs / text).is_dir():
        path = (runs / text).resolve()
    if not path.is_dir():
        raise _no_folder(text, path)
    is_hf = (path / "config.json").is_file()
    if format_ == "hf" and not is_hf:
        raise UsageError(f"`{text}` is not a Hugging Face folder: it has no `config.json`")
    if is_hf and format_ in ("auto", "hf"):
        if not any(path.glob("*.safetensors")) and any(path.glob("pytorch_model*.bin")):
            return _converted(path, None, "hf", cache, None)
        return _hf(path, text)
    if format_ == "native" or (format_ == "auto" and _is_native(path)):
        return _native(path, text, at, cache)
    own = None if config is None else (cwd / Path(config).expanduser()).resolve()
    return _converted(path, at if isinstance(at, int) else None, format_, cache, own)


def _is_native(path: Path) -> bool:
    """Whether a folder is a checkpoint of ours, or holds some, or is a run without any yet."""
    from cpt.checkpoint import manifest, store

    if (path / manifest.NAME).is_file() or (path / "plan.json").is_file() or (path / "stages").is_dir():
        return True
    return any(
        (f / manifest.NAME).is_file() for folder in store.checkpoint_folders(path) for _, f in store.steps(folder)
    )


def _converted(path: Path, step: int | None, format_: str, cache: Path, config: Path | None) -> Checkpoint:
    """A checkpoint of another format: what it holds, and the conversion that a run begins with."""
    from cpt.checkpoint.content import MODEL
    from cpt.checkpoint.find import find as find_any
    from cpt.checkpoint.find import known
    from cpt.checkpoint.formats import Reading
    from cpt.checkpoint.formats.torch_dist_names import MANIFEST

    found = find_any(path, step)
    if format_ not in ("auto", found.format):
        raise UsageError(f"`{found.folder}` is of format `{found.format}`, not `{format_}`")
    form = known()[found.format]
    content = form.open(found.folder, Reading(config=config))
    files = [f for f in sorted(found.folder.rglob("*")) if f.is_file()]
    identity = content.id or hash_text(
        canonical_json([[str(f.relative_to(found.folder)), *_content(f)] for f in files])
    )
    weights = sum(content.array(name, MODEL).nbytes for name in content.atoms)
    states = sum(a.nbytes for atom in content.atoms.values() for k, a in atom.states.items() if k != MODEL)
    layout = f", {content.layout}" if content.layout is not None else ""
    conversion = Conversion(
        source=str(found.folder),
        format=found.format,
        shown=f"{form.title}{layout}",
        bytes=weights + states,
        identity=identity,
        config=None if config is None else str(config),
    )
    said = content.objects.get(MANIFEST) or {}  # of a checkpoint of ours on its way through another format
    progress = dict(said.get("progress") or {})
    lr = _parent_lr(progress)
    holds = ["weights", *(["cursor"] if progress else []), *(["optimizer"] if content.has_optimizer else [])]
    holds += ["lr"] if lr is not None else []
    tokenizer = content.files.get("tokenizer.json")
    if tokenizer is None and config is not None and (config / "tokenizer.json").is_file():
        tokenizer = config / "tokenizer.json"
    return Checkpoint(
        kind="native",
        path=cache / "checkpoints" / identity[:32],
        identity=identity,
        model=content.model,
        tokenizer=tokenizer.parent if tokenizer is not None else None,
        tokenizer_hash=(said.get("origin") or {}).get("tokenizer_hash"),
        holds=tuple(holds),
        lr=lr,
        conversion=conversion,
    )


def _no_folder(text: str, path: Path) -> UsageError:
    if path.exists():
        return UsageError(f"`{text}` is a file, wanted the folder of a checkpoint")
    parent = path.parent
    if not parent.is_dir():
        return UsageError(f"there is no folder `{text}`")
    near = nearest(path.name, [p.name for p in parent.iterdir() if p.is_dir()])
    hints = [f"did you mean `{Path(text).parent / near!s}`?"] if near else []
    return UsageError(f"there is no folder `{text}`", *hints)


def _hf(path: Path, text: str) -> Checkpoint:
    from cpt.checkpoint import hf_config

    files = sorted({f for pattern in _WEIGHTS for f in path.glob(pattern)})
    if not files:
        raise UsageError(f"`{text}` has a `config.json` but no weights", "`*.safetensors` files are wanted beside it")
    model = hf_config.read_config(path)
    if why := why_not_trained(model):
        raise PlanError(f"`{text}`: {why}", CONVERT_HINT)
    weights = [f for f in files if f.suffix == ".safetensors"]
    identity = hash_text(canonical_json([read_json(path / "config.json"), [_content(f) for f in weights]]))
    tokenizer = path if (path / "tokenizer.json").is_file() else None
    return Checkpoint(kind="hf", path=path, identity=identity, model=model, tokenizer=tokenizer)


def _content(path: Path) -> list[Any]:
    """Name, size and a hash of slices of a large file: its identity without reading all of it."""
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for i in range(_PLACES):
                file.seek(max(0, (size - _SLICE)) * i // (_PLACES - 1))
                digest.update(file.read(_SLICE))
    except OSError as error:
        raise UsageError(f"`{path}` {why_unreadable(error)}") from None
    return [path.name, size, digest.hexdigest()]


def _native(path: Path, text: str, at: int | str | None, cache: Path) -> Checkpoint:
    from cpt.checkpoint import manifest, store, tokenizer_files

    if isinstance(at, int):
        inside = [f / store.folder_name(at) for f in store.checkpoint_folders(path)]
        whole = [f for f in inside if store.is_whole(f)]
        if not whole:
            raise UsageError(f"`{text}` has no whole checkpoint of step {at:,}")
        folder = whole[0]
    else:
        folder = store.resolve(path)
    facts = manifest.read(folder)
    if ((facts.conversion or {}).get("options") or {}).get("optimizer") == "dp_reshardable":
        return _converted(folder, None, "auto", cache, None)  # its optimizer fits the ranks that it was written for
    progress = dict(facts.progress)
    holds = ["weights", "cursor"]
    if facts.optimizer is not None:
        holds.append("optimizer")
    if facts.rng_ranks:
        holds.append("rng")
    lr = _parent_lr(progress)
    if lr is not None:
        holds.append("lr")
    return Checkpoint(
        kind="native",
        path=folder,
        identity=facts.identity,
        model=facts.model,
        tokenizer=tokenizer_files.of_checkpoint(folder),
        tokenizer_hash=facts.origin.tokenizer_hash,
        holds=tuple(holds),
        lr=lr,
    )


def _parent_lr(progress: dict[str, Any]) -> ParentLr | None:
    """The lr that a native checkpoint ended on, with its curve."""
    from cpt.schedules.join import ParentLr

    said = progress.get("lr") or {}
    if not isinstance(said, dict) or "last" not in said:
        return None
    curve = said.get("lr")
    lr = from_json(Lr, curve) if isinstance(curve, dict) else None
    return ParentLr(last=float(said["last"]), run_step=int(progress.get("run_step", 0)), lr=lr)
