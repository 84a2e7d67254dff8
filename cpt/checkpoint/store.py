"""Checkpoints on disk: which one is whole and newest, which ones stay, and the saver that the training loop is given.

    stages/<stage>/checkpoints/
        iter_0000100/                         Megatron torch_dist files + manifest.json, written last
        latest_checkpointed_iteration.txt     what Megatron itself looks for
        .writing-3-iter_0000200/              attempt 3 is saving
        .damaged-iter_0000150/                bytes were not what the manifest says; kept for a person to look at

A checkpoint is written under a name of its attempt and appears by one rename once its manifest is there; it is removed
by renaming it away first. So whatever is killed and whenever, a folder is whole, or it is known not to be. Before
anything appears or goes, the writer looks whether the stage's lock is still its own (`fence`): an attempt that was cut
off and taken over publishes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cpt.base.errors import EnvironmentProblem, Fenced, UsageError
from cpt.base.files import fsync_folder, read_json, write_atomic
from cpt.checkpoint import manifest as manifests
from cpt.checkpoint.manifest import Manifest, Origin, is_whole, why_not_whole

if TYPE_CHECKING:
    from cpt.plan.types import Retain, Saving

if TYPE_CHECKING:
    from cpt.base.lock import Fence
    from cpt.engine.ports import Engine, Progress

__all__ = [
    "StageStore",
    "checkpoint_folders",
    "folder_name",
    "is_whole",
    "newest_good",
    "newest_whole",
    "resolve",
    "steps",
    "to_remove",
    "why_not_whole",
]

T = TypeVar("T")
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron's folder for weights that belong to no step, as a converted model's
_FOLDER = re.compile(r"iter_(\d{7,})")
_REMOVED, _NEW, _DAMAGED = ".removing-", ".writing-", ".damaged-"
_WRITING = re.compile(r"\.writing-(?:(\d+)-)?(iter_\d{7,})")
_CHECK_THREADS = 4


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


def newest_good(
    checkpoints: str | os.PathLike[str], *, deep: bool = True
) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint whose bytes are those that were written, and the newer ones that had to be skipped.

    To be called by whoever holds the stage's lock, before ranks start. A damaged checkpoint is renamed (the reason says
    how), so that nobody takes it for a good one later and its step can be saved again. One whose save was complete but
    for its last rename appears.

    Args:
        deep: read all bytes and compare their CRC-32 with the manifest's, not the sizes alone.
    """
    checkpoints = Path(checkpoints)
    for new in checkpoints.glob(f"{_NEW}*"):
        _settle(new)
    skipped: list[tuple[Path, str]] = []
    for _, folder in reversed(steps(checkpoints)):
        why = why_not_whole(folder)
        if why is None and deep:
            why = why_damaged(folder)
        if why is None:
            return folder, skipped
        if _is_damage(folder):
            why = f"{why}; it is kept as `{_set_aside(folder).name}`"
        skipped.append((folder, why))
    return None, skipped


def why_damaged(folder: Path) -> str | None:
    """Which file of a whole checkpoint has other bytes than were written; None when none has. Reads everything."""
    from concurrent.futures import ThreadPoolExecutor

    from cpt.checkpoint.sums import Summing, file_sums

    try:
        sums = file_sums(folder)
    except UsageError as error:
        return error.message
    with ThreadPoolExecutor(_CHECK_THREADS) as pool:
        found = pool.map(lambda s: s.why_not_there() or Summing(s).why_wrong(), sums)
        return next((why for why in found if why is not None), None)


def _is_damage(folder: Path) -> bool:
    """Whether what is wrong with a checkpoint will stay so: not an unfinished save, not one of a newer release."""
    try:
        value = read_json(folder / manifests.NAME)
    except OSError:  # no manifest: `clean` removes it
        return False
    except ValueError:
        return True
    return (
        isinstance(value, dict)
        and value.get("format") == manifests.FORMAT
        and value.get("version") == manifests.VERSION
    )


def _set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it is none any more."""
    names = (f"{_DAMAGED}{folder.name}" + (f".{n}" if n else "") for n in range(1000))
    target = next(folder.with_name(name) for name in names if not folder.with_name(name).exists())
    os.rename(folder, target)
    fsync_folder(folder.parent)
    return target


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


def publish(folder: Path, new: Path) -> None:
    """Let a whole new checkpoint appear, in the place of an old one if there is one."""
    if not folder.exists():
        os.rename(new, folder)
        fsync_folder(folder.parent)
        return
    gone = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    os.rename(new, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(gone, ignore_errors=True)


def clean(checkpoints: Path, attempt: int | None = None) -> list[Path]:
    """Remove what killed saves and removals left behind; gives the checkpoints that never got whole.

    Args:
        attempt: whose turn it is: what later attempts are writing stays. None = there is no later one.
    """
    left = []
    for new in checkpoints.glob(f"{_NEW}*"):
        match = _WRITING.fullmatch(new.name)
        if match and match[1] and attempt is not None and int(match[1]) > attempt:
            continue
        if not _settle(new):
            if match and not is_whole(new):
                left.append(new.with_name(match[2]))
            shutil.rmtree(new, ignore_errors=True)
    for entry in checkpoints.glob(f"{_REMOVED}*"):
        shutil.rmtree(entry, ignore_errors=True)
    for _, folder in steps(checkpoints):
        if not (folder / manifests.NAME).exists():
            remove(folder)
            left.append(folder)
    return left


def _settle(new: Path) -> bool:
    """Let a save appear that was killed between its manifest and its rename; whether it was one."""
    match = _WRITING.fullmatch(new.name)
    if match is None or not is_whole(new) or (folder := new.with_name(match[2])).exists():
        return False
    publish(folder, new)
    return True


class StageStore:
    """Writes the checkpoints of one stage; implements `engine.ports.Saver`. Every method is called by all ranks.

    Needs torch.distributed. An error on one rank is raised on all of them. Saves of one store follow one another: a new
    save first finishes the one under way.

    Args:
        stage_dir: the stage's folder; checkpoints lie in its `checkpoints/`.
        saving: what stays, and whether writing goes on while training does.
        origin: what the engine cannot know: stage, plan, parent, tokenizer.
        keep_steps: steps whose checkpoints are never removed.
        fence: of the attempt; None = nobody can take the stage over.
        warn: called on rank 0 with one line for a person.
        clock: gives the time [unix seconds].

    Every method raises Fenced once another attempt has taken the stage over; nothing is published or removed then.
    """

    def __init__(
        self,
        stage_dir: str | os.PathLike[str],
        saving: Saving,
        *,
        origin: Origin,
        keep_steps: Sequence[int] = (),
        fence: Fence | None = None,
        warn: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        from cpt.checkpoint.native import Ranks

        self.checkpoints = Path(stage_dir) / "checkpoints"
        self.saving = saving
        self.origin = origin
        self.keep_steps = tuple(keep_steps)
        self.fence = fence
        self.warn = warn
        self.clock = clock
        self._ranks = Ranks()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._last: Path | None = None  # what this store wrote last: the engine has not been there since
        self._on_first(self._clean)

    def _clean(self) -> None:
        self._check_fence()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        for folder in clean(self.checkpoints, self.origin.attempt):
            self.warn(f"removed `{folder}`, whose save never finished")

    def _check_fence(self) -> None:
        if self.fence is not None:
            self.fence.check()

    @contextlib.contextmanager
    def _fenced(self) -> Iterator[None]:
        """Whoever has taken the stage over removes what this attempt writes or looks at: then that is the error."""
        try:
            yield
        except Exception:
            self._check_fence()
            raise

    def _on_first(self, call: Callable[[], T]) -> T:
        """What `call` gives on the first rank, on all ranks."""

        def guarded() -> T:
            with self._fenced():
                return call()

        return self._ranks.on_first(guarded)

    def newest_whole(self) -> Path | None:
        """The newest whole checkpoint of this stage, the same on all ranks; skipped ones are named by `warn`."""
        self.wait()

        def look() -> Path | None:
            found, skipped = newest_whole(self.checkpoints)
            for folder, why in skipped:
                instead = f"`{found.name}` is used instead" if found else "there is no older one"
                self.warn(f"checkpoint `{folder}` is not whole and was skipped: {why}; {instead}")
            return found

        return self._on_first(look)

    def save(self, engine: Engine, progress: Progress, *, phase: str) -> Path:
        """Write `iter_<step>` whole or not at all; with `saving.asynchronous` in the background until `wait`.

        Saving what is there already (a stage's end that was just saved as a regular checkpoint, a stop right after a
        resume) only rewrites the manifest. A whole checkpoint that is replaced stays until the new one is whole.

        Raises:
            EnvironmentProblem: the disk is full or a rank cannot write. The partial folder is gone, older ones
                stay.
            Fenced: another attempt has taken the stage over.
        """
        from cpt.checkpoint import native

        assert phase in manifests.PHASES, phase
        self.wait()
        folder = self.checkpoints / folder_name(progress.step)
        there = self._on_first(lambda: self._what_is_there(folder, progress))
        if there == "same":
            self._on_first(lambda: self._relabel(folder, progress, phase))
            return folder
        into = folder.with_name(f"{_NEW}{self.origin.attempt}-{folder.name}")
        write = native.begin_save(
            engine,
            into,
            progress=progress,
            phase=phase,
            origin=self.origin,
            created=self.clock(),
            ranks=self._ranks,
            asynchronous=self.saving.asynchronous,
            may_seal=self._check_fence,
        )

        def finish() -> None:
            with self._fenced():
                write()
            self._on_first(lambda: self._publish(folder, into))

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
            CptError: it failed; older checkpoints stay.
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
        """same: this very state, whole · other: another state, or nothing that counts."""
        import dataclasses

        self._check_fence()
        if not is_whole(folder):
            return "other"
        same = self._last == folder or manifests.read(folder).progress == dataclasses.asdict(progress)
        return "same" if same else "other"

    def _relabel(self, folder: Path, progress: Progress, phase: str) -> None:
        import dataclasses

        old = manifests.read(folder)
        phase = max(phase, old.phase, key=manifests.PHASES.index)
        self._check_fence()
        manifests.write(folder, dataclasses.replace(old, phase=phase, progress=dataclasses.asdict(progress)))
        self._after()

    def _publish(self, folder: Path, new: Path) -> None:
        """Into its place, on the first rank, once a checkpoint is whole."""
        try:
            self._check_fence()
        except Fenced:
            shutil.rmtree(new, ignore_errors=True)
            raise
        publish(folder, new)
        self._after()

    def _after(self) -> None:
        """Tracker file and retention, on the first rank."""
        self._check_fence()
        whole = track(self.checkpoints)
        gone = set(to_remove([manifests.read(folder) for _, folder in whole], self.saving.retain, self.keep_steps))
        for step, folder in whole:
            if step in gone:
                self._check_fence()
                remove(folder)


def track(checkpoints: Path) -> list[tuple[int, Path]]:
    """Let the tracker file name the newest whole checkpoint; gives (step, folder) of all whole ones, oldest first.

    Looks again once it has written: whoever was cut off in between, and taken over, corrects an older step's number.
    """
    written = None
    while (whole := [(s, f) for s, f in steps(checkpoints) if is_whole(f)]) and whole[-1][0] != written:
        written = whole[-1][0]
        write_atomic(checkpoints / TRACKER, str(written))
    return whole


def no_space(folder: Path, needed: int, free: int) -> EnvironmentProblem:
    """The error of a full disk.

    Args:
        needed, free: [bytes].
    """
    from cpt.base.units import show_bytes

    return EnvironmentProblem(
        f"not enough disk space to save `{folder}`: {show_bytes(needed)} needed, {show_bytes(free)} free",
        "the checkpoints saved before are still whole; make space, and the same command goes on from the newest one",
    )
