"""Checkpoints on disk: which one is whole and newest, which ones stay, and the saver that the training loop is given.

    stages/<stage>/checkpoints/
        iter_0000100/                         Megatron torch_dist files + manifest.json, written last
        latest_checkpointed_iteration.txt     what Megatron itself looks for

A checkpoint is written into its final folder and counts only once the manifest is there; it is removed by renaming it
away first. So whatever is killed and whenever, a folder is whole, or it is known not to be.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.base.errors import StageFailed, UsageError
from cpt.base.files import fsync_folder, read_json, write_atomic
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint.manifest import Manifest, Origin, is_whole, why_not_whole
from cpt.plan.types import Retain, Saving

if TYPE_CHECKING:
    from cpt.engine.ports import Engine, Progress

__all__ = [
    "StageStore",
    "checkpoint_folders",
    "folder_name",
    "is_whole",
    "newest_whole",
    "resolve",
    "steps",
    "to_remove",
    "why_not_whole",
]

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron's folder for weights that belong to no step, as a converted model's
_FOLDER = re.compile(r"iter_(\d{7,})")
_REMOVED, _NEW = ".removing-", ".writing-"


def folder_name(step: int) -> str:
    """`iter_0000100`."""
    return f"iter_{step:07d}"


def is_folder_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint, whole or not."""
    return _FOLDER.fullmatch(name) is not None


def steps(checkpoints: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint folder, whole or not, oldest first."""
    found = []
    try:
        entries = list(os.scandir(checkpoints))
    except (FileNotFoundError, NotADirectoryError):
        return []
    for entry in entries:
        match = _FOLDER.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append((int(match[1]), Path(entry.path)))
    return sorted(found)


def newest_whole(checkpoints: str | os.PathLike[str]) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint of a folder, and the newer ones that had to be skipped, each with the reason."""
    skipped: list[tuple[Path, str]] = []
    for _, folder in reversed(steps(checkpoints)):
        why = why_not_whole(folder)
        if why is None:
            return folder, skipped
        skipped.append((folder, why))
    return None, skipped


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that a person means: an `iter_*` folder, or the newest whole one of a stage or run folder.

    Raises:
        UsageError: nothing whole is there.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"`{path}` is not a folder")
    if is_folder_name(path.name) or (path / manifests.NAME).is_file():
        why = why_not_whole(path)
        if why is not None:
            raise UsageError(f"`{path}` is not whole: {why}")
        return path
    skipped: list[tuple[Path, str]] = []
    for checkpoints in checkpoint_folders(path):
        found, passed = newest_whole(checkpoints)
        skipped += passed
        if found is not None:
            return found
        if is_whole(checkpoints / RELEASE):
            return checkpoints / RELEASE
    if skipped:
        raise UsageError(f"`{path}` holds no whole checkpoint", *(f"`{p}`: {why}" for p, why in skipped[:3]))
    raise UsageError(
        f"`{path}` holds no checkpoint", "give a run, a stage, an `iter_*` folder or a Hugging Face folder"
    )


def checkpoint_folders(path: str | os.PathLike[str]) -> list[Path]:
    """The folders of checkpoints under a run, stage or checkpoints folder; of a run what it trained last comes first.

    A stage whose result is taken from another run leads there. Stages that only convert come after all that train:
    what they hold may be the base model.
    """
    path = Path(path)
    if (path / "stages").is_dir():
        kinds: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            plan = read_json(path / "plan.json")
            kinds = {name: stage.get("kind", "train") for name, stage in plan["stages"].items()}
        order = list(kinds)
        stages = [p for p in (path / "stages").iterdir() if p.is_dir()]
        stages.sort(
            key=lambda p: (kinds.get(p.name) == "train", order.index(p.name) if p.name in kinds else -1, p.name),
            reverse=True,
        )
        return [stage_home(p) / "checkpoints" for p in stages]
    path = stage_home(path)
    return [path / "checkpoints"] if (path / "checkpoints").is_dir() else [path]


def stage_home(stage_dir: Path) -> Path:
    """The folder that holds a stage's results: its own, or by `state.json` that of the run it takes them from."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        reference = read_json(stage_dir / "state.json")["reference"]
        if isinstance(reference, str) and reference:
            return Path(reference)
    return stage_dir


def to_remove(kept: Sequence[Manifest], retain: Retain, keep_steps: Sequence[int] = ()) -> list[int]:
    """Steps of the whole checkpoints that need not stay, given all of them.

    Never removed: the newest, the last `retain.last`, `pre_anneal`, the plan's `keep_steps`, the first one at or past
    each multiple of `retain.every` tokens, and with `retain.stage_ends` the stage's end.
    """
    kept = sorted(kept, key=lambda m: m.step)
    stays = {m.step for m in kept[-max(1, retain.last) :]} | set(keep_steps)
    passed = 0
    for m in kept:
        if m.phase == "pre_anneal" or (m.phase == "end" and retain.stage_ends):
            stays.add(m.step)
        if retain.every and m.tokens // retain.every > passed:
            passed = m.tokens // retain.every
            stays.add(m.step)
    return [m.step for m in kept if m.step not in stays]


def remove(folder: Path) -> None:
    """Remove a checkpoint; killed half way, it is not taken for a checkpoint any more."""
    gone = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    fsync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def replace(folder: Path, new: Path) -> None:
    """Put a whole new checkpoint in the place of an old one."""
    gone = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    os.rename(new, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def clean(checkpoints: Path) -> list[Path]:
    """Remove what killed saves and removals left behind (folders without a manifest); gives their names."""
    for new in checkpoints.glob(f"{_NEW}*"):
        folder = new.with_name(new.name.removeprefix(_NEW))
        if is_whole(new) and not folder.exists():  # killed between the two renames of `replace`
            os.rename(new, folder)
        shutil.rmtree(new, ignore_errors=True)
    for entry in checkpoints.glob(f"{_REMOVED}*"):
        shutil.rmtree(entry, ignore_errors=True)
    left = [folder for _, folder in steps(checkpoints) if not (folder / manifests.NAME).exists()]
    for folder in left:
        remove(folder)
    return left


class StageStore:
    """Writes the checkpoints of one stage; implements `engine.ports.Saver`. Every method is called by all ranks.

    Needs torch.distributed. An error on one rank is raised on all of them. Saves of one store follow one another: a new
    save first finishes the one under way.

    Args:
        stage_dir: the stage's folder; checkpoints lie in its `checkpoints/`.
        saving: what stays, and whether writing goes on while training does.
        origin: what the engine cannot know: stage, plan, parent, tokenizer.
        keep_steps: steps whose checkpoints are never removed.
        warn: called on rank 0 with one line for a person.
        clock: gives the time [unix seconds].
    """

    def __init__(
        self,
        stage_dir: str | os.PathLike[str],
        saving: Saving,
        *,
        origin: Origin,
        keep_steps: Sequence[int] = (),
        warn: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        from cpt.checkpoint.native import Ranks

        self.checkpoints = Path(stage_dir) / "checkpoints"
        self.saving = saving
        self.origin = origin
        self.keep_steps = tuple(keep_steps)
        self.warn = warn
        self.clock = clock
        self._ranks = Ranks()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: Path | None = None  # what this store wrote last: the engine has not been there since
        if self._ranks.rank == 0:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in clean(self.checkpoints):
                self.warn(f"removed `{folder}`, whose save never finished")
        self._ranks.barrier()

    def newest_whole(self) -> Path | None:
        """The newest whole checkpoint of this stage, the same on all ranks; skipped ones are named by `warn`."""
        self.wait()

        def look() -> Path | None:
            found, skipped = newest_whole(self.checkpoints)
            for folder, why in skipped:
                instead = f"`{found.name}` is used instead" if found else "there is no older one"
                self.warn(f"checkpoint `{folder}` is not whole and was skipped: {why}; {instead}")
            return found

        return self._ranks.on_first(look)

    def save(self, engine: Engine, progress: Progress, *, phase: str) -> Path:
        """Write `iter_<step>` whole or not at all; with `saving.asynchronous` in the background until `wait`.

        Saving what is there already (a stage's end that was just saved as a regular checkpoint, a stop right after a
        resume) only rewrites the manifest. A whole checkpoint that is replaced stays until the new one is whole.

        Raises:
            StageFailed: the disk is full or a rank cannot write. The partial folder is gone, older checkpoints stay.
        """
        from cpt.checkpoint import native

        assert phase in manifests.PHASES, phase
        self.wait()
        folder = self.checkpoints / folder_name(progress.step)
        there = self._ranks.on_first(lambda: self._what_is_there(folder, progress))
        if there == "same":
            self._ranks.on_first(lambda: self._relabel(folder, progress, phase))
            return folder
        into = folder.with_name(f"{_NEW}{folder.name}") if there == "other" else folder
        write = native.begin_save(
            engine,
            into,
            progress=progress,
            phase=phase,
            origin=self.origin,
            created=self.clock(),
            ranks=self._ranks,
            asynchronous=self.saving.asynchronous,
        )

        def finish() -> None:
            write()
            self._ranks.on_first(lambda: self._after(folder, into))

        self._last = folder
        if self.saving.asynchronous:
            self._thread = threading.Thread(target=self._in_background, args=(finish,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            finish()
        return folder

    def wait(self) -> None:
        """Finish an asynchronous save that is under way.

        Raises:
            StageFailed: it failed; older checkpoints stay.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            self._last = None
            raise error

    def _in_background(self, finish: Callable[[], None]) -> None:
        try:
            finish()
        except BaseException as error:
            self._error = error

    def _what_is_there(self, folder: Path, progress: Progress) -> str:
        """same: this very state, whole · other: a whole checkpoint of another state · nothing that counts."""
        import dataclasses

        if not is_whole(folder):
            return "nothing"
        same = self._last == folder or manifests.read(folder).progress == dataclasses.asdict(progress)
        return "same" if same else "other"

    def _relabel(self, folder: Path, progress: Progress, phase: str) -> None:
        import dataclasses

        old = manifests.read(folder)
        phase = max(phase, old.phase, key=manifests.PHASES.index)
        manifests.write(folder, dataclasses.replace(old, phase=phase, progress=dataclasses.asdict(progress)))
        self._after(folder, folder)

    def _after(self, folder: Path, written: Path) -> None:
        """Into its place, tracker file and retention, on the first rank, once a checkpoint is whole."""
        if written != folder:
            replace(folder, written)
        whole = [(step, folder) for step, folder in steps(self.checkpoints) if is_whole(folder)]
        write_atomic(self.checkpoints / TRACKER, str(whole[-1][0]))
        gone = set(to_remove([manifests.read(folder) for _, folder in whole], self.saving.retain, self.keep_steps))
        for step, folder in whole:
            if step in gone:
                remove(folder)


def no_space(folder: Path, needed: int, free: int) -> StageFailed:
    """The error of a full disk.

    Args:
        needed, free: [bytes].
    """
    from cpt.base.units import show_bytes

    return StageFailed(
        f"not enough disk space to save `{folder}`: {show_bytes(needed)} needed, {show_bytes(free)} free",
        "the checkpoints saved before are still whole; make space, and the same command goes on from the newest one",
    )
