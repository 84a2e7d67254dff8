"""The process that sends a run's events to wandb: `python -m cpt.report.wandb_process RUN [online|offline]`.

It ends when its stdin is closed and everything is sent. Started and ended by `report.wandb`.
"""

from __future__ import annotations

import contextlib
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

from cpt.base.events import Event
from cpt.plan.types import RunPlan
from cpt.report.wandb import FOLDER, read_state, write_state

POLL_SECONDS = 1.0
INIT_SECONDS = 60
ORPHAN_SECONDS = 5.0


class Sent:
    """How far each event file was sent, by mode [bytes]. Steps that a later attempt repeats are not sent again."""

    def __init__(self, run_dir: Path, mode: str) -> None:
        self.run_dir, self.folder, self.mode = run_dir, run_dir / FOLDER, mode
        state = read_state(self.folder)
        self.id = str(state.get("id") or uuid.uuid4().hex[:12])
        sent = state.get("sent")
        self.all: dict[str, dict[str, int]] = sent if isinstance(sent, dict) else {}
        self.bytes = self.all.setdefault(mode, {})
        self.problem: str | None = None

    def save(self) -> None:
        write_state(self.folder, id=self.id, sent=self.all, problem=self.problem)

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


def send(run_dir: Path, mode: str, ending: threading.Event) -> None:
    """Send events until the run ends, then the rest."""
    from cpt.plan.types import to_json
    from cpt.stages.attempt import read_plan

    plan = read_plan(run_dir)
    mode = mode or str(plan.tracking.get("wandb", "offline"))
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
        for stage, event in sent.new():
            if stage in plan.stages and stage not in before:
                continue
            found = values(stage, event, before.get(stage, 0))
            if found:
                run.log(found)
        sent.save()
        if last:
            break
        ending.wait(POLL_SECONDS)
    run.finish(exit_code=0)
    sent.save()


def main(arguments: list[str]) -> int:
    """Run until stdin is closed; a problem is written to `wandb/sent.json` and its text to the log."""
    run_dir, mode = Path(arguments[0]), arguments[1] if len(arguments) > 1 else ""
    ending = threading.Event()

    def listen() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        ending.set()

    threading.Thread(target=listen, daemon=True).start()
    # The parent may be killed and can then not end this process: it ends itself, late, whatever wandb does.
    threading.Thread(target=_give_up, args=(ending, os.getppid()), daemon=True).start()
    try:
        send(run_dir, mode, ending)
        return 0
    except BaseException as error:
        folder = run_dir / FOLDER
        text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        with contextlib.suppress(OSError):
            write_state(folder, **{**read_state(folder), "problem": text})
        import traceback

        traceback.print_exc()
        return 1


def _give_up(ending: threading.Event, parent: int) -> None:
    """Without its parent, end this process and all that it started, after a little time to send the rest."""
    ending.wait()
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(ORPHAN_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
