"""The process that sends a run's events to wandb: `python -m cpt.report.wandb_process RUN [online|offline]`.

It ends when its stdin is closed and everything is sent. Started and ended by `report.wandb`.

With `--beside` a batch job's script starts it, beside the ranks: SIGTERM takes the place of the end of stdin, and it
limits by itself how long the rest takes. One process at a time sends: the next job's waits until this one has ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpt.base.errors import CptError, EnvironmentProblem
from cpt.base.events import Event
from cpt.plan.types import RunPlan
from cpt.report.wandb import CLOSE_SECONDS, FOLDER, LATER, LOG, read_state, take_back, write_state

POLL_SECONDS = 1.0
INIT_SECONDS = 60
ORPHAN_SECONDS = 5.0
BESIDE = "--beside"


class Sent:
    """How far each event file was sent, by mode [bytes]. Steps that a later attempt repeats are not sent again."""

    def __init__(self, run_dir: Path, mode: str) -> None:
        self.run_dir, self.folder, self.mode = run_dir, run_dir / FOLDER, mode
        state = read_state(self.folder)
        self.id = str(state.get("id") or uuid.uuid4().hex[:12])
        sent = state.get("sent")
        self.all: dict[str, dict[str, int]] = sent if isinstance(sent, dict) else {}
        self.bytes = self.all.setdefault(mode, {})
        self.begun: dict[str, int] | None = dict(self.bytes)

    def save(self) -> None:
        others = read_state(self.folder).get("sent")  # a process of the other mode may write there as well
        self.all = {**(others if isinstance(others, dict) else {}), self.mode: self.bytes}
        begun = {self.mode: self.begun} if self.begun is not None else {}
        write_state(self.folder, id=self.id, sent=self.all, begun=begun, problem=None)

    def finish(self) -> None:
        """All that was taken has arrived."""
        self.begun = None
        self.save()

    def new(self) -> Iterator[tuple[str, Event]]:
        """(stage, event) of every line that was not sent yet; each counts as sent once it is taken."""
        for path in event_files(self.run_dir):
            key = str(path.relative_to(self.run_dir))
            stage = path.parts[-3]
            try:
                with open(path, "rb") as file:
                    file.seek(self.bytes.get(key, 0))
                    lines = file.readlines()
            except OSError:
                continue
            for line in lines:
                if not line.endswith(b"\n"):  # half written: the rest comes later
                    break
                self.bytes[key] = self.bytes.get(key, 0) + len(line)
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and self._is_new(stage, event):
                        yield stage, event

    def _is_new(self, stage: str, event: Event) -> bool:
        """Whether no earlier attempt has sent this step or evaluation."""
        step = event.get("step")
        if not isinstance(step, int):
            return True
        name = f"{event.get('kind')} of {stage}"
        new = step > self.bytes.get(name, -1)
        if new:
            self.bytes[name] = step
        return new


def event_files(run_dir: Path) -> list[Path]:
    """The event files of all attempts, in the order in which they were begun."""
    found = [
        (path.stat().st_mtime if path.exists() else 0.0, int(match[1]), path)
        for path in run_dir.glob("stages/*/attempt_*/events.jsonl")
        if (match := re.fullmatch(r"attempt_(\d+)", path.parent.name))
    ]
    return [path for _, _, path in sorted(found, key=lambda item: (item[0], item[1]))]


def values(stage: str, event: Event, before: int) -> dict[str, Any]:
    """An event as wandb's flat names; empty for events that are not sent.

    Args:
        before: tokens of the stages before this one.
    """
    kind = event.get("kind")
    tokens = event.get("tokens")
    if kind not in ("step", "eval") or not isinstance(tokens, int):
        return {}
    found: dict[str, Any] = {"tokens": before + tokens, "stage": stage, "stage_step": event.get("step")}
    if kind == "step":
        found |= {f"train/{name}": event.get(name) for name in ("loss", "lr", "grad_norm", "tokens_per_s")}
        found |= {f"train/loss/{source}": loss for source, loss in _mapping(event, "losses")}
        found |= {f"train/given/{source}": given for source, given in _mapping(event, "given")}
        found["train/skipped"] = int(bool(event.get("skipped")))
    else:
        for domain, loss in _mapping(event, "losses"):
            if isinstance(loss, dict):
                found |= {f"valid/loss/{domain}": loss.get("loss"), f"valid/bits_per_byte/{domain}": loss.get("bpb")}
    return {name: value for name, value in found.items() if value is not None}


def _mapping(event: Event, name: str) -> list[tuple[str, Any]]:
    value = event.get(name)
    return list(value.items()) if isinstance(value, dict) else []


def offsets(plan: RunPlan) -> dict[str, int]:
    """Tokens of the train stages before each stage, in the order of the plan; proxies of laws are left out."""
    found, at = {}, 0
    for name, stage in plan.stages.items():
        if stage.group is not None:
            continue
        found[name] = at
        at += stage.train.tokens if stage.train else 0
    return found


@contextlib.contextmanager
def alone(run_dir: Path, mode: str, ending: threading.Event) -> Iterator[bool]:
    """Be the only process that sends a run: waits for another one until `ending`; gives whether it is.

    The right ends with the process, however it ends. On a file system without locks everybody is alone.
    """
    with open(run_dir / FOLDER / f".sending-{mode}.lock", "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if ending.wait(POLL_SECONDS):
                    yield False
                    return
            except OSError:
                break
            else:
                break
        yield True


def send(run_dir: Path, mode: str, ending: threading.Event, *, must: bool = True) -> None:
    """Send events until the run ends, then the rest.

    Args:
        must: it is an error when another process sends them all the time.

    Raises:
        EnvironmentProblem: it does.
    """
    from cpt.stages.attempt import read_plan

    plan = read_plan(run_dir)
    mode = mode or str(plan.tracking.get("wandb", "offline"))
    with alone(run_dir, mode, ending) as is_alone:
        if is_alone:
            _send(plan, run_dir, mode, ending)
        elif must:
            raise EnvironmentProblem("another process is sending the run")


def _send(plan: RunPlan, run_dir: Path, mode: str, ending: threading.Event) -> None:
    from cpt.base.records import to_json

    sent = Sent(run_dir, mode)
    sent.save()
    # Everything that wandb writes stays in the run folder.
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        os.environ[name] = str(run_dir / FOLDER)
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    settings = wandb.Settings(init_timeout=INIT_SECONDS, console="off", disable_git=True, disable_code=True)
    run = wandb.init(
        project=str(plan.tracking.get("project") or "cpt"),
        entity=plan.tracking.get("entity") or None,
        tags=[str(tag) for tag in plan.tracking.get("tags") or ()],
        name=plan.name,
        id=sent.id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        dir=str(run_dir / FOLDER),
        config={"plan": plan.id, "recipe": to_json(plan.config)},
        settings=settings,
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    before = offsets(plan)
    while True:
        last = ending.is_set()  # looked at first: what was written before the end is then still read
        before_bytes = dict(sent.bytes)
        for stage, event in sent.new():
            if stage in plan.stages and stage not in before:
                continue
            found = values(stage, event, before.get(stage, 0))
            if found:
                run.log(found)
        if sent.bytes != before_bytes:
            sent.save()
        if last:
            break
        ending.wait(POLL_SECONDS)
    run.finish(exit_code=0)
    sent.finish()


def main(arguments: list[str]) -> int:
    """Run until stdin is closed; a problem is written to `wandb/sent.json` and its text to the log."""
    words = [word for word in arguments if word != BESIDE]
    run_dir, mode = Path(words[0]), words[1] if len(words) > 1 else ""
    ending = threading.Event()
    if BESIDE in arguments:
        return _beside(run_dir, mode, ending)

    def listen() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        ending.set()

    threading.Thread(target=listen, daemon=True).start()
    # The parent may be killed and can then not end this process: it ends itself, late, whatever wandb does.
    threading.Thread(target=_give_up, args=(ending, os.getppid()), daemon=True).start()
    return 0 if _try(run_dir, mode, ending) is None else 1


def _try(run_dir: Path, mode: str, ending: threading.Event, *, must: bool = True) -> str | None:
    """Send; what went wrong as one line, which is noted, or None."""
    try:
        send(run_dir, mode, ending, must=must)
        return None
    except BaseException as error:
        import traceback

        traceback.print_exc()
        text = error.message if isinstance(error, CptError) else f"{type(error).__name__}: {error}"
        return _note(run_dir, text.splitlines()[0][:500])


def _note(run_dir: Path, problem: str) -> str:
    with contextlib.suppress(OSError):
        write_state(run_dir / FOLDER, **{**read_state(run_dir / FOLDER), "problem": problem})
    return problem


def _beside(run_dir: Path, mode: str, ending: threading.Event) -> int:
    """Until SIGTERM, or until the script that started it has ended; a problem is one line of the script's log."""
    import psutil

    # What a queue sends to every process of a job is for the ranks, and for the script, which then ends this one.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    parent, script = os.getppid(), sys.stderr

    def tell(problem: str) -> None:
        with contextlib.suppress(OSError):
            script.write(f"warning: wandb failed: {problem}; {LATER}\n")
            script.flush()

    def limit() -> None:
        while not ending.wait(POLL_SECONDS):
            if os.getppid() != parent:
                ending.set()
        time.sleep(CLOSE_SECONDS)
        take_back(run_dir / FOLDER)
        tell(_note(run_dir, f"it did not finish within {CLOSE_SECONDS:.0f} s"))
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        os._exit(1)

    threading.Thread(target=limit, daemon=True).start()
    try:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        log = open(run_dir / FOLDER / LOG, "a")  # noqa: SIM115 - open as long as the process lives
        script = os.fdopen(os.dup(2), "w")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    except OSError as error:
        tell(str(error))
        return 1
    problem = _try(run_dir, mode, ending, must=False)
    if problem:
        tell(problem)
    return 0 if problem is None else 1


def _give_up(ending: threading.Event, parent: int) -> None:
    """Without its parent, end this process and all that it started, after a little time to send the rest."""
    ending.wait()
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(ORPHAN_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
