"""Random faults against local runs, which are gone on with until they are done; then they are compared.

Used by `test_faults.py` (a few) and `benchmarks/faults.py` (many).

    rank      SIGKILL of a rank                             parent   SIGKILL of the ranks' parent
    command   SIGKILL of `cpt run`                          term     SIGTERM to it: saved
    stopped   SIGSTOP of a rank: found as a hang            disk     the run's disk is full for a while (tmpfs, as root)
    damage    newest checkpoint: a shard deleted or with a flipped bit, then something is killed
    corpus    a file of a corpus, prepared or as given, is gone for a while, and something is killed
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cpt.base import lock, processes
from cpt.base.files import read_lines
from cpt.checkpoint import manifest, store, verify
from cpt.stages import state
from tests.dist import killing
from tests.dist.killing import Running, Runs

KINDS = ("rank", "command", "parent", "term", "stopped", "disk", "damage", "corpus")
STAGES = ("domain", "second", "anneal")
HANG_AFTER = 8  # [s]
DISK = 24 << 20  # of a run folder that gets full [bytes]
_LONGEST = 120.0  # after this long a fault has not been noticed [s]

_RECIPE = """
train:
  seq_length: 64
  global_batch_size: 4
  micro_batch_size: 1
  precision: fp32
  parallel: {layout}
  evaluate: {{every: 2560, tokens: 2048}}
checkpoint: {{every: 1280, retain: {{last: 3}}}}
stages:
  domain:
    from: base
    tokens: {domain}
    mixture: {{even: 0.7, odd: 0.3}}
    lr: {{schedule: rewarm, peak: 1e-3, warmup: 4}}
  second:
    from: domain
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: {second}
    mixture: {{even: 0.2, odd: 0.8}}
  anneal:
    from: second
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: {anneal}
    mixture: {{even: 0.2, odd: 0.8}}
    lr: {{schedule: linear, end: 0}}
"""


def recipe(layout: str, steps: tuple[int, int, int]) -> str:
    """Three stages of so many steps at a layout of two ranks, such as `{tp: 2}`."""
    tokens = dict(zip(STAGES, (256 * n for n in steps), strict=True))
    return killing.TINY + _RECIPE.format(layout=layout, **tokens)


@dataclass(frozen=True)
class Fault:
    """One fault that happened.

    Args:
        ended: exit code of the command, or that it went on by itself.
        seconds: until every process that it hit was gone, or the next attempt had begun [s].
        wrong: what should not have been; empty when all was well.
    """

    kind: str
    stage: str
    step: int
    ended: str
    seconds: float
    wrong: str = ""

    def text(self) -> str:
        where = f"{self.stage} step {self.step}" if self.stage else "before the first step"
        return f"{self.kind:8} {where:22} {self.ended:38} {self.seconds:5.1f} s  {self.wrong}".rstrip()


@dataclass
class Faulted:
    """A run that gets faults and is gone on with after each.

    Args:
        name: of its folder of runs.
        overrides: of `cpt run`.
    """

    runs: Runs
    name: str
    chance: random.Random
    overrides: tuple[str, ...] = (f"launcher.hang_after={HANG_AFTER}",)
    running: Running | None = None
    done: bool = False
    problems: list[str] = field(default_factory=list)
    _read: int = 0  # of the output [bytes]

    @property
    def run_dir(self) -> Path:
        return self.runs.folder / self.name / "it"

    def go_on(self) -> Running:
        """The command at work: begun, or gone on with if it has ended."""
        if self.running is not None and self.running.process.poll() is None:
            return self.running
        began = (self.run_dir / "command.txt").exists() and (self.run_dir / "environment.json").exists()
        if began and self.chance.random() < 0.8:
            self.running = self.runs.resume(self.name)
        else:
            self.running = self.runs.start(self.name, *self.overrides)
        return self.running

    def fault(self, kind: str) -> Fault | None:
        """One fault at a random moment; None when the run was done before."""
        while not self.done:
            running = self.go_on()
            with contextlib.suppress(_Ended):
                self._wait(running)
                return self._hit(running, kind)
            self._note_end(running)
        return None

    def finish(self) -> None:
        """Go on until all is done; a third failure without a fault is a problem."""
        for _ in range(3):
            if self.done:
                return
            running = self.go_on()
            try:
                running.process.wait(300)
            except subprocess.TimeoutExpired:
                self.problems.append("it did not end within 300 s")
                self.end()
            self._note_end(running)

    def end(self) -> None:
        """Leave nothing running."""
        if self.running is not None and self.running.process.poll() is None:
            pids = [p.pid for p in self.running.tree()]
            self.running.process.kill()
            self.running.process.wait()
            for pid in pids:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def _note_end(self, running: Running) -> None:
        """The command ended without a fault of ours: only well is good."""
        code = running.process.wait(60)
        self.done = code == 0
        if code != 0:
            self.problems.append(f"ended with exit code {code} by itself: {self._new_text()[-1500:]}")
        elif left := running.orphans():
            self.problems.append(f"processes {left} live on after the end")

    def _new_text(self) -> str:
        data = (self.runs.folder / f"{self.name}.out").read_bytes()
        text, self._read = data[self._read :].decode(errors="replace"), len(data)
        return text

    def _wait(self, running: Running) -> None:
        """Until a random moment: soon after the start, after some steps, inside a save, or between two stages."""
        what = self.chance.choices(("start", "steps", "save", "turn"), (0.2, 0.35, 0.25, 0.2))[0]
        if what == "start":
            limit = time.monotonic() + self.chance.uniform(0, 5)
            _until(running, lambda: time.monotonic() > limit, 0.05)
        elif what == "steps":
            before, more = self._steps(), self.chance.randrange(1, 12)
            _until(running, lambda: self._steps() >= before + more, 0.02)
            time.sleep(self.chance.uniform(0, 0.2))
        elif what == "turn":
            done = self._num_done()
            _until(running, lambda: self._num_done() > done, 0.02)
            time.sleep(self.chance.uniform(0, 3))
        else:
            known = set(self.run_dir.glob("stages/*/checkpoints/.writing-*"))
            writing = self.run_dir.glob
            _until(running, lambda: bool(set(writing("stages/*/checkpoints/.writing-*")) - known), 0.002)

    def _steps(self) -> int:
        """Steps that all attempts have logged together."""
        return sum(
            e.get("kind") == "step" for p in self.run_dir.glob("stages/*/attempt_*/events.jsonl") for e in read_lines(p)
        )

    def _num_done(self) -> int:
        """Stages that are done."""
        return sum(state.read(p).status == state.DONE for p in self.run_dir.glob("stages/*"))

    def _where(self) -> tuple[str, int]:
        """Stage and last step of the newest attempt that has one."""
        for stage in reversed(STAGES):
            steps = [e["step"] for e in _events(self.run_dir / "stages" / stage) if e.get("kind") == "step"]
            if steps:
                return stage, int(steps[-1])
        return "", 0

    def _attempts(self) -> int:
        return len(list(self.run_dir.glob("stages/*/attempt_*/job.json")))

    def _hit(self, running: Running, kind: str) -> Fault:
        undo: Callable[[], None] = lambda: None  # noqa: E731
        victim = 0
        if kind in ("rank", "stopped"):
            _until(running, lambda: len(running.ranks()) == 2, 0.05)
            victim = self.chance.choice(running.newest_ranks)
        elif kind == "parent":
            _until(running, lambda: _parent(running) is not None, 0.05)
            victim = _parent(running) or 0
        elif kind == "damage":
            _until(running, lambda: self._newest() is not None, 0.05)
        running.tree()
        stage, step = self._where()
        attempts = self._attempts()
        self._new_text()
        begin = time.monotonic()
        if kind == "disk":
            undo = self._fill()
        elif kind == "corpus":
            undo = self._hide()
        elif kind == "damage":
            self._damage()
        if kind in ("damage", "corpus"):  # nobody would look before the next start
            ranks = running.ranks()
            victim = self.chance.choice(ranks) if ranks and self.chance.random() < 0.6 else running.process.pid
        if kind == "term" or kind == "command":
            victim = running.process.pid
        if victim:
            number = {"stopped": signal.SIGSTOP, "term": signal.SIGTERM}.get(kind, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, number)
        ended, wrong = self._settle(running, attempts, patience=20.0 if kind == "disk" else _LONGEST)
        seconds = time.monotonic() - begin
        if kind in ("corpus", "disk") and not self.done:
            ended += self._meanwhile()
        undo()
        if kind == "command" and ended != "exit -9":
            wrong += f" wanted -9 of {ended}"
        if kind == "term" and ended not in ("exit 75", "exit -15", "exit 130", "done"):
            wrong += " not saved"
        text = self._new_text()
        for word in ("Traceback (most recent", "error: unexpected"):
            if word in text:
                wrong += f" `{word}`: {text[-2000:]}"
        return Fault(kind, stage, step, ended, seconds, wrong)

    def _settle(self, running: Running, attempts: int, patience: float) -> tuple[str, str]:
        """Wait until the command has ended, or has begun anew by itself; (how, what is wrong)."""
        hit = running.seen - {running.process.pid}
        deadline = time.monotonic() + patience
        while running.process.poll() is None:
            if self._attempts() > attempts and not _living(hit):
                return "went on by itself", ""
            if time.monotonic() > deadline:
                if patience < _LONGEST:
                    return "not noticed", ""
                self.end()
                return "not noticed", f"nothing happened for {patience:.0f} s"
            running.tree()
            time.sleep(0.05)
        code = running.process.wait()
        left = running.orphans()
        held = [p for p in (self.run_dir, *self.run_dir.glob("stages/*")) if lock.live_holder(p) is not None]
        self.done = code == 0
        wrong = f"processes {left} live on" if left else f"{held} still locked" if held else ""
        return "done" if self.done else f"exit {code}", wrong

    def _meanwhile(self) -> str:
        """One try while a disk is full or a file away: it is refused; or the file is not needed, or made again."""
        running = self.go_on()
        before = self._steps()
        with contextlib.suppress(_Ended):
            _until(running, lambda: self._steps() > before, 0.05)
            return ", then worked on"
        code = running.process.wait()
        self.done = code == 0
        return f", then exit {code}"

    def _fill(self) -> Callable[[], None]:
        """Fill the run's disk; gives what empties it again."""
        ballast = self.runs.folder / self.name / "ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
            while True:
                file.write(bytes(512))
        return lambda: ballast.unlink(missing_ok=True)

    def _hide(self) -> Callable[[], None]:
        """Rename a file that the run reads; gives what renames it back. (Root reads through any mode.)"""
        prepared = sorted(self.runs.folder.glob("**/corpora/*/train.bin"))
        given = sorted(self.runs.folder.glob("*.jsonl"))
        path = self.chance.choice(prepared if self.chance.random() < 0.6 else given)
        away = self.runs.folder / f"{path.name}.away"  # not beside it: a corpus that is made again is a new folder
        os.rename(path, away)

        def back() -> None:
            if path.exists() and path.read_bytes() != away.read_bytes():
                self.problems.append(f"`{path}` was made again with other bytes")
            os.replace(away, path)

        return back

    def _newest(self) -> Path | None:
        """The newest checkpoint of the run."""
        for stage in reversed(STAGES):
            found, _ = store.newest_whole(self.run_dir / "stages" / stage / "checkpoints")
            if found is not None:
                return found
        return None

    def _damage(self) -> None:
        while True:
            folder = self._newest()
            assert folder is not None
            with contextlib.suppress(FileNotFoundError):  # it was just being replaced
                shard = self.chance.choice(sorted(folder.glob("*.distcp")))
                if self.chance.random() < 0.5:
                    shard.unlink()
                    return
                with open(shard, "r+b") as file:
                    at = self.chance.randrange(shard.stat().st_size)
                    file.seek(at)
                    old = file.read(1)
                    file.seek(at)
                    file.write(bytes([old[0] ^ (1 << self.chance.randrange(8))]))
                return


class _Ended(Exception):
    """The command ended before the moment came."""


def _until(running: Running, happened: Callable[[], bool], every: float) -> None:
    deadline = time.monotonic() + 300
    while not happened():
        if running.process.poll() is not None:
            raise _Ended
        assert time.monotonic() < deadline, running.text()[-3000:]
        running.tree()
        time.sleep(every)


def _events(stage_dir: Path) -> Iterator[dict[str, object]]:
    found = sorted(stage_dir.glob("attempt_*"), key=lambda p: int(p.name.removeprefix("attempt_")), reverse=True)
    for attempt in found:
        events = list(read_lines(attempt / "events.jsonl"))
        if any(e.get("kind") == "step" for e in events):
            return iter(events)
    return iter(())


def _parent(running: Running) -> int | None:
    """Pid of the ranks' parent."""
    for process in running.tree():
        with contextlib.suppress(psutil.Error):
            if process.ppid() == running.process.pid and "cpt.worker" in process.cmdline():
                return process.pid
    return None


def _living(pids: set[int]) -> list[int]:
    return [pid for pid in pids if processes.start_time(pid) is not None]


def differences(runs: Runs, name: str, straight: str = "straight") -> list[str]:
    """How a run's result differs from the straight one's."""
    one, other = (runs.folder / n / "it" for n in (straight, name))
    found = []
    for stage in STAGES:
        try:
            if killing.content(one, stage) != killing.content(other, stage):
                found.append(f"{stage}: weights, optimizer or random states differ")
            newest, _ = store.newest_whole(other / "stages" / stage / "checkpoints")
            assert newest is not None and manifest.read(newest).phase == "end"
            found += [f"{stage}: {why}" for why in verify.verify(newest)]
        except AssertionError as error:
            found.append(f"{stage}: {error}")
        if killing.step_history(one, stage) != killing.step_history(other, stage):
            found.append(f"{stage}: losses or learning rates of some steps differ")
    return found


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A small disk at a new folder, if we may make one; whether there is one."""
    folder.mkdir()
    made = os.geteuid() == 0 and _call("mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder))
    try:
        yield made
    finally:
        if made:
            _call("umount", "-l", str(folder))


def _call(*words: str) -> bool:
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
