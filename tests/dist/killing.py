"""Runs `cpt run` as a person does, kills parts of it at chosen moments, and looks at what is left.

Used by `test_kill_resume.py` on a small model and by `benchmarks/kill_resume.py` on the published one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cpt.base import processes
from cpt.base.files import read_lines
from cpt.checkpoint import manifest, store

ROOT = Path(__file__).resolve().parents[2]
# How recipes on `write_topics` begin: here, on this machine, two sources of text.
TOPICS = """
defaults: [/launcher: local, _self_]
sources:
  even: {paths: even.jsonl, valid: 5%}
  odd: {paths: odd.jsonl, valid: 5%}
"""
# The same with a new model of two layers and a new tokenizer.
TINY = (
    TOPICS
    + """
base: scratch
model: {family: llama, num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4}
tokenizer: {train_on: [even, odd], vocab_size: 384}
"""
)


@dataclass
class Runs:
    """A folder with a recipe. Each `runs` name has its own run folders, so that nothing is re-used between them."""

    folder: Path
    recipe: str = "three"
    command: list[str] = field(default_factory=lambda: [sys.executable, "-m", "cpt"])

    def start(self, runs: str, *overrides: str) -> Running:
        """Start `cpt run` in the background; its output goes to `<runs>.out`."""
        return self._start(runs, "run", f"recipe={self.recipe}", f"runs={runs}", "name=it", *overrides)

    def resume(self, runs: str, name: str = "it") -> Running:
        """Go on with a run in the background, by `cpt resume`."""
        return self._start(runs, "resume", f"{runs}/{name}")

    def _start(self, runs: str, *words: str) -> Running:
        run_dir = self.folder / runs / "it"
        before = {p.name: len(list(p.glob("attempt_*"))) for p in (run_dir / "stages").glob("*")}
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        with open(self.folder / f"{runs}.out", "ab") as out:
            process = subprocess.Popen(
                [*self.command, *words], cwd=self.folder, env=environ, stdout=out, stderr=out, start_new_session=True
            )
        return Running(process, run_dir, self.folder / f"{runs}.out", before=before)

    def finish(self, runs: str, *overrides: str, timeout: float = 900.0) -> Running:
        """Run to its end."""
        running = self.start(runs, *overrides)
        running.process.wait(timeout)
        return running


@dataclass
class Running:
    """A `cpt run` that was started."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    out: Path
    before: dict[str, int] = field(default_factory=dict)  # attempts that each stage had when this one was started
    seen: set[int] = field(default_factory=set)  # every pid of its tree that was looked at
    newest_ranks: list[int] = field(default_factory=list)  # what `ranks` found last

    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The living processes below `cpt run`, and itself."""
        try:
            top = psutil.Process(self.process.pid)
            found = [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.seen |= {p.pid for p in found}
        return found

    def ranks(self) -> list[int]:
        """Pids of the ranks, in order of rank; empty when none live."""
        parents = [p for p in self.tree() if _parent(p) == self.process.pid]
        self.newest_ranks = sorted(c.pid for p in parents for c in _children(p))
        return self.newest_ranks

    def orphans(self, seconds: float = 20.0) -> list[int]:
        """Pids of the tree that still live after some seconds. The command itself must have ended."""
        deadline = time.monotonic() + seconds
        while True:
            left = [pid for pid in self.seen if processes.start_time(pid) is not None]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.05)

    def events(self, stage: str) -> list[dict[str, Any]]:
        """Events of the newest attempt of a stage, if it was begun by this command."""
        folder = self.run_dir / "stages" / stage / f"attempt_{self.before.get(stage, 0) + 1}"
        return list(read_lines(folder / "events.jsonl"))

    def wait_until(self, happened: Callable[[], bool], what: str, seconds: float = 300.0, every: float = 0.002) -> None:
        """Wait for something to happen while the run goes on."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, f"the run ended before {what}:\n{self.text()[-3000:]}"
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
            time.sleep(every)


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


class TooLate(AssertionError):
    """The moment was over when the kill came, as it may be on a machine that is busy: to be tried again."""


@dataclass(frozen=True)
class Moment:
    """When a rank is killed."""

    name: str
    wait: Callable[[Running, random.Random], None]
    was_met: Callable[[Running], bool] = lambda running: True  # called right after the kill
    victim: str = "rank"  # or "command": `cpt run` itself, where no rank lives
    quick: bool = False  # no time to look for the ranks: `wait` has done it


def before_first_checkpoint(stage: str, every: int) -> Moment:
    """After some steps, before anything is saved."""

    def wait(running: Running, chance: random.Random) -> None:
        after = chance.randrange(1, every)
        running.wait_until(lambda: _step(running, stage) >= after, f"step {after} of {stage}")

    def was_met(running: Running) -> bool:
        return store.newest_whole(running.run_dir / "stages" / stage / "checkpoints")[0] is None

    return Moment(f"before the first checkpoint of {stage}", wait, was_met)


def inside_a_save(stage: str) -> Moment:
    """While a checkpoint folder is being filled: its manifest is not there yet."""

    def wait(running: Running, chance: random.Random) -> None:
        folder = running.run_dir / "stages" / stage / "checkpoints"
        running.wait_until(lambda: _step(running, stage) >= 0, f"the first step of {stage}")
        running.ranks()  # looked for now: a save of a small model is over in a tenth of a second

        def half_written() -> bool:
            return any(not (p / manifest.NAME).exists() for p in folder.glob(".writing-*"))

        running.wait_until(half_written, f"a save of {stage}", every=0.0002)

    def was_met(running: Running) -> bool:
        folder = running.run_dir / "stages" / stage / "checkpoints"
        return any(not store.is_whole(p) for p in folder.glob(".writing-*"))

    return Moment(f"inside a save of {stage}", wait, was_met, quick=True)


def inside_an_evaluation(stage: str, every: int, seconds: float) -> Moment:
    """Between a step that is followed by an evaluation and the evaluation's end.

    Args:
        seconds: about how long an evaluation takes [s].
    """

    def due(running: Running) -> int | None:
        found = [e["step"] for e in running.events(stage) if e["kind"] == "step" and e["step"] % every == 0]
        return found[-1] if found else None

    def wait(running: Running, chance: random.Random) -> None:
        running.wait_until(lambda: due(running) is not None, f"an evaluation of {stage}")
        time.sleep(chance.uniform(0.2, 0.6) * seconds)

    def was_met(running: Running) -> bool:
        step = due(running)
        return not any(e["kind"] == "eval" and e["step"] == step for e in running.events(stage))

    return Moment(f"inside an evaluation of {stage}", wait, was_met)


def between_stages(done: str, following: str) -> Moment:
    """After a stage is recorded as done, before a rank of the next one works. Only the command itself lives then."""

    def wait(running: Running, chance: random.Random) -> None:
        path = running.run_dir / "stages" / done / "state.json"
        running.wait_until(lambda: path.exists() and '"done"' in path.read_text(), f"the end of {done}")
        running.tree()

    return Moment(
        f"between {done} and {following}", wait, lambda running: not running.events(following), victim="command"
    )


def after_step(stage: str, steps: int) -> Moment:
    """Somewhere in a stage."""

    def wait(running: Running, chance: random.Random) -> None:
        after = chance.randrange(1, steps)
        running.wait_until(lambda: _step(running, stage) >= after, f"step {after} of {stage}")
        time.sleep(chance.uniform(0, 0.2))

    return Moment(f"after a step of {stage}", wait)


def _step(running: Running, stage: str) -> int:
    return max((int(e["step"]) for e in running.events(stage) if e["kind"] == "step"), default=-1)


@dataclass(frozen=True)
class Kill:
    """One kill that happened."""

    moment: str
    victim: str
    seconds_to_end: float  # from the kill until the whole tree was gone
    exit_code: int


def kill_at(runs: Runs, name: str, moment: Moment, chance: random.Random, *overrides: str) -> Kill:
    """Start the run, kill a random rank at a moment, and see that nothing is left running.

    Raises:
        TooLate: the moment was over.
    """
    running = runs.start(name, *overrides)
    try:
        moment.wait(running, chance)
        ranks = running.newest_ranks if moment.quick else running.ranks()
        if moment.victim == "command":
            victim, what = running.process.pid, "cpt run"
        else:
            if not ranks:
                raise TooLate(f"no rank lives {moment.name}")
            rank = chance.randrange(len(ranks))
            victim, what = ranks[rank], f"rank {rank}"
        begin = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        if not moment.was_met(running):
            raise TooLate(f"not {moment.name} any more")
        code = running.process.wait(60)
        left = running.orphans()
        seconds = time.monotonic() - begin
        assert not left, f"processes {left} live on after the kill of {what} {moment.name}"
        return Kill(moment.name, what, seconds, code)
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def content(run_dir: Path, stage: str) -> dict[str, str]:
    """CRC of every tensor file of a stage's end: weights, main weights, moments and random states of all ranks."""
    newest, _ = store.newest_whole(run_dir / "stages" / stage / "checkpoints")
    assert newest is not None, f"{stage} has no checkpoint"
    found = manifest.read(newest)
    assert found.phase == "end"
    return {name: facts.crc32 for name, facts in found.files.items() if name.endswith(".distcp")}


def step_history(run_dir: Path, stage: str) -> dict[int, tuple[float, float]]:
    """Loss and lr of every step, later attempts in the place of earlier ones."""
    from cpt.base.events import stage_events

    events: Iterator[dict[str, Any]] = stage_events(run_dir / "stages" / stage)
    return {e["step"]: (e["loss"], e["lr"]) for e in events if e["kind"] == "step"}


def write_topics(folder: Path) -> None:
    """Two small corpora from the Python library's own help topics, which are real prose and on every machine."""
    from pydoc_data.topics import topics

    for name, part in (("even", sorted(topics)[::2]), ("odd", sorted(topics)[1::2])):
        lines = [json.dumps({"text": topics[key]}) for key in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
