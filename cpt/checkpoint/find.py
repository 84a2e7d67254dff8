"""What a person's folder is: a checkpoint of some format, or a folder of steps of which one is meant.

    OUT/iter_0000007/, hf/, atom/                      a checkpoint
    latest_checkpointed_iteration.txt, iter_*/         Megatron's folder of steps; the file holds a number or `release`
    latest_universal, global_step*_universal/          DeepSpeed's
    RUN/stages/<stage>/{checkpoints,hf,megatron,atom}/ a run of ours, and each of its stages

Only names and small files are looked at.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cpt.base.errors import UsageError
from cpt.base.registry import nearest
from cpt.checkpoint import formats, manifest, store
from cpt.checkpoint.formats import FORMATS, Format, WritableFormat

PARTIAL = ".partial"  # of an unfinished conversion
UNIVERSAL = "latest_universal"
_UNIVERSAL_FOLDER = re.compile(r"(?:global_step)?(\d+)_universal")
RESULTS = ("hf", "megatron", "atom")  # folders that stages of kind `convert` leave
# A folder that looks like several is the first of these: ours hold a config.json or a manifest beside.
_ORDER = ("atom", "torch_dist", "megatron", "ds-universal", "hf")
READERS_SAY = ("megatron", "hf", "atom")  # formats whose readers say all that is missing, and what to do


class NotWhole(UsageError):
    """A checkpoint is meant that was never finished, or is not all there any more."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint folder.

    Args:
        format: its name in `FORMATS`.
        step: of the training run, where the folder's name says it.
        notes: one line each for a person: which of several was taken, and what was passed over and why.
    """

    folder: Path
    format: str
    step: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A folder of one step; `step` None: `release`, or a checkpoint whose folder's name says none."""

    folder: Path
    step: int | None
    why_not: str | None


def known() -> dict[str, type[Format]]:
    """All formats by name, in the order in which a folder is tried."""
    for module in pkgutil.iter_modules(formats.__path__):
        importlib.import_module(f"{formats.__name__}.{module.name}")
    names = sorted(FORMATS, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))
    return {name: FORMATS.get(name) for name in names}


def writable() -> dict[str, type[WritableFormat]]:
    """The formats that are written too, by name."""
    return {name: one for name, one in known().items() if issubclass(one, WritableFormat)}


def recognise(folder: Path) -> str | None:
    """The format of a checkpoint folder; None for any other folder."""
    return next((name for name, one in known().items() if one.recognise(folder)), None)


def find(path: Path, step: int | None = None) -> Found:
    """The checkpoint that a path means.

    Args:
        step: of several steps, which one; None = the one that the tracker file names, else the newest whole one.

    Raises:
        UsageError: nothing is there, it is not whole, or nothing known; says what is there and what is known.
    """
    refuse_unfinished(path)
    if not path.is_dir():
        raise _not_a_folder(path)
    candidates = list(_candidates(path))
    if candidates:
        return _chosen(path, candidates, step)
    name = recognise(path)
    if name is not None:
        return _itself(path, name, step)
    for folder in store.checkpoint_folders(path):
        if folder != path and (candidates := list(_candidates(folder))):
            return _chosen(folder, candidates, step)
    for folder in _results(path) if not _is_atom_without_manifest(path) else ():  # whose `hf/` is no checkpoint
        found = find(folder, step)
        return replace(found, notes=(*found.notes, f"`{found.folder}` is taken"))
    raise _unknown(path)


def refuse_unfinished(path: Path) -> None:
    """Refuse a conversion that has not finished.

    Raises:
        NotWhole: it is one; says which command goes on with it.
    """
    from cpt.checkpoint.job import place

    if (begun := place.unfinished(path)) is not None:
        raise NotWhole(f"`{path}` is {begun}")


def listed(path: Path) -> list[Candidate]:
    """Every checkpoint of a path, oldest first: the path itself, steps in it, or all that a run or stage holds."""
    if not path.is_dir():
        raise _not_a_folder(path)
    if store.is_folder_name(path.name) or (recognise(path) is not None and not any(_candidates(path))):
        return [Candidate(path, _step_of(path.resolve()), why_not_whole(path))]
    found: list[Candidate] = []
    for folder in reversed(store.checkpoint_folders(path)):
        found += _candidates(folder)
    for result in reversed(list(_results(path))):
        found += list(_candidates(result)) or [Candidate(result, None, why_not_whole(result))]
    return found


def _is_atom_without_manifest(path: Path) -> bool:
    return any(path.glob("atoms-*.safetensors"))


def _results(path: Path) -> Iterator[Path]:
    """Folders that the conversions of a run or a stage left, the last stage's first."""
    for folder in store.checkpoint_folders(path):
        home = folder.parent if folder.name == "checkpoints" and folder != path else folder
        for name in RESULTS:
            if (home / name).is_dir() and (recognise(home / name) is not None or any(_candidates(home / name))):
                yield home / name


def why_not_whole(folder: Path) -> str | None:
    """What shows that a checkpoint was never finished, or is not all there any more, in one phrase; None when nothing
    does. Looks at names, sizes and indices, never at values."""
    if (folder / manifest.NAME).is_file():
        return manifest.why_not_whole(folder)
    if (folder / ".metadata").is_file() and not (folder / "metadata.json").is_file():
        return "`.metadata` is there and `metadata.json` is not: its save never finished, or it is torch's own format"
    name = recognise(folder)
    if name is None:
        return "it holds nothing that is known" if any(folder.iterdir()) else "it is empty"
    return known()[name].why_not_whole(folder)


def _itself(path: Path, name: str, step: int | None) -> Found:
    """A path that is one checkpoint."""
    own = _step_of(path.resolve())
    if step is not None and own is not None and own != step:
        raise UsageError(f"`{path}` is step {own:,}, and step {step:,} was asked for", "give the folder of all steps")
    why = why_not_whole(path)
    if why is not None and name not in READERS_SAY:
        raise _not_whole(path, why)
    return Found(folder=path, format=name, step=own)


def _candidates(path: Path) -> Iterator[Candidate]:
    """Folders of steps inside a folder, oldest first; `release` comes last."""
    steps = store.steps(path)
    steps += (
        sorted((int(m[1]), p) for p in path.iterdir() if (m := _UNIVERSAL_FOLDER.fullmatch(p.name)) and p.is_dir())
        if path.is_dir()
        else []
    )
    ours = any((folder / manifest.NAME).is_file() for _, folder in steps)
    for number, folder in steps:
        why = why_not_whole(folder)
        if ours and not (folder / manifest.NAME).is_file() and recognise(folder) in (None, "torch_dist"):
            why = "its save never finished (no manifest)"
        yield Candidate(folder, number, why)
    if (path / store.RELEASE).is_dir():
        yield Candidate(path / store.RELEASE, None, why_not_whole(path / store.RELEASE))


def _chosen(path: Path, candidates: list[Candidate], step: int | None) -> Found:
    notes: list[str] = []
    if step is not None:
        one = next((c for c in candidates if c.step == step), None)
        if one is None:
            there = ", ".join(_name(c) for c in candidates)
            raise UsageError(f"`{path}` has no step {step:,}", f"there are {there}")
    else:
        one = _tracked(path, candidates, notes) or next((c for c in reversed(candidates) if c.why_not is None), None)
        if one is None:
            one = candidates[-1]
            if len(candidates) > 1:
                raise NotWhole(
                    f"`{path}` holds no whole checkpoint", *(f"`{c.folder}`: {c.why_not}" for c in candidates[-3:])
                )
    name = recognise(one.folder)
    if one.why_not is not None and (name not in READERS_SAY or (one.folder / manifest.NAME).is_file()):
        raise _not_whole(one.folder, one.why_not)
    if name is None:
        raise _unknown(one.folder)
    if step is None and len(candidates) > 1:
        for c in candidates:
            if c.why_not is not None and (one.step is None or c.step is None or c.step > one.step):
                notes.append(f"`{c.folder}` was passed over: {c.why_not}")
        notes.append(f"`{one.folder}` is taken, one of {len(candidates)} steps; `--step` takes another")
    return Found(folder=one.folder, format=name, step=one.step, notes=tuple(notes))


def _tracked(path: Path, candidates: list[Candidate], notes: list[str]) -> Candidate | None:
    """What the tracker file names, if that is whole. Of our own saves the newest whole one counts."""
    if any((c.folder / manifest.NAME).is_file() for c in candidates):
        return None
    for name in (store.TRACKER, UNIVERSAL):
        try:
            word = (path / name).read_text(encoding="utf-8").strip()[:200]
        except (OSError, ValueError):
            continue
        one = next((c for c in candidates if word in (c.folder.name, str(c.step), _name(c))), None)
        if not word:
            notes.append(f"`{path / name}` is empty")
        elif one is None:
            notes.append(f"`{path / name}` names `{word}`, which is not there")
        elif one.why_not is not None:
            notes.append(f"`{path / name}` names `{word}`, which is not whole")
        else:
            return one
    return None


def _name(candidate: Candidate) -> str:
    return store.RELEASE if candidate.step is None else f"{candidate.step:,}"


def _step_of(folder: Path) -> int | None:
    for pattern in (re.compile(r"iter_(\d{7,})"), _UNIVERSAL_FOLDER):
        if match := pattern.fullmatch(folder.name):
            return int(match[1])
    return None


def _not_whole(folder: Path, why: str) -> NotWhole:
    """Refuses a folder whose save never finished; names the newest whole step beside it."""
    beside = [c for c in _candidates(folder.resolve().parent) if c.why_not is None]
    hints = [f"the newest whole step beside it is `{beside[-1].folder.name}`"] if beside else []
    return NotWhole(f"`{folder}` is not whole: {why}", *hints)


def _not_a_folder(path: Path) -> UsageError:
    if path.is_file():
        return UsageError(f"`{path}` is a file, wanted is a folder", f"did you mean `{path.parent}`?")
    try:
        near = nearest(path.name, [p.name for p in path.parent.iterdir() if p.is_dir()])
    except OSError:
        near = None
    hints = [f"did you mean `{path.parent / near}`?"] if near else []
    return UsageError(f"there is no folder `{path}`", *hints)


def _unknown(path: Path) -> UsageError:
    """The error for a folder that is nothing known: what is there, what is known."""
    if path.name.endswith(PARTIAL) or (path / "journal.jsonl").is_file():
        return UsageError(f"`{path}` is an unfinished conversion", "the command that began it goes on with it")
    if (path / ".metadata").is_file():
        return _not_whole(path, why_not_whole(path) or "")
    if _is_atom_without_manifest(path):
        return _not_whole(path, "`atom.json` is missing, which says what its `atoms-*.safetensors` hold")
    if any(any(path.glob(p + n)) for p in ("", "global_step*/") for n in ("*_optim_states.pt", "mp_rank_*_states.pt")):
        return UsageError(
            f"`{path}` is a DeepSpeed checkpoint that is not universal: it has no `zero/`",
            "run DeepSpeed's `ds_to_universal.py --input_folder IN --output_folder OUT` first, and give OUT",
        )
    names = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
    shown = ", ".join(f"`{n}`" for n in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    hints = []
    if "adapter_config.json" in names:
        hints.append("it is an adapter: merge it into its base model first")
    weights = [n for n in names if n.endswith((".safetensors", ".bin", ".gguf"))]
    if weights and "config.json" not in names:
        hints.append(f"there is `{weights[0]}`, but no `config.json` beside it")
    elif "config.json" in names:
        hints.append("there is a `config.json`, but it names no `model_type`" if not _has_type(path) else "")
    hints.append(
        "known are folders of Hugging Face (`config.json`), Megatron (`iter_*`, `metadata.json`, `mp_rank_*`), "
        "`atom.json`, DeepSpeed universal (`zero/`), and runs and stages of cpt"
    )
    return UsageError(f"`{path}` is no checkpoint: it holds {shown or 'nothing'}", *filter(None, hints))


def _has_type(path: Path) -> bool:
    try:
        return "model_type" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
