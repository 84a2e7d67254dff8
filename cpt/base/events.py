"""The run's own log. Everything a person sees later (status, report, wandb) is made from it and can be made again.

One event a line: `{"t": unix seconds, "kind": ..., ...}`. Kinds written by a stage's rank 0 (`attempt_N/events.jsonl`):

    stage_start  stage, attempt, step, tokens, steps, world_size, tp, pp, dp, parent, resumed (bool)
    step         step (completed steps), tokens (of the stage so far), loss, lr, grad_norm, tokens_per_s, step_s,
                 losses {source: nats/token}, given {source: tokens so far}, skipped (why, when the update was skipped),
                 left_out (step of the spike, when a rollback left it out), memory_bytes (of rank 0 at its highest)
    eval         step, tokens, when (start | during | end), losses {source: {loss [nats/token], bpb [bits/byte],
                 tokens, bytes, stderr [nats/token]}}, seconds; of a weight average also mixture {source: share}, its
                 step the number of the candidate
    law          law, verdict (fit | unfit), reasons (why unfit), no_recommendation, runs, rows, heldout (largest error
                 on rows left out), values (what `${law:...}` gives), path, seconds
    note         text
    save         step, path, seconds, phase
    warning      text, step
    guard        source, before, now, limit [nats/token], step
    stop         reason, step
    stage_end    step, tokens, seconds

Kinds written by the orchestrator (`events.jsonl` of the run): run_start (command, plan id), stage (stage, status,
reason), job (stage, id of the queue, after: ids), data (source, tokens, seconds), run_end (exit_code, reason).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cpt.base.files import append_line, read_lines

Event = dict[str, Any]

HAPPENED = ("warning", "note")  # kinds of what has happened, whatever comes after it


class EventLog:
    """Append-only writer of one event file.

    Args:
        path: the `.jsonl` file; its folder must exist.
        clock: gives the time [unix seconds].
        sinks: called with every event after it is on disk (live display, wandb).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        clock: Callable[[], float] = time.time,
        sinks: tuple[Callable[[Event], None], ...] = (),
    ) -> None:
        self.path = Path(path)
        self.clock = clock
        self.sinks = sinks

    def write(self, kind: str, **fields: Any) -> Event:
        """Append one event and hand it to the sinks."""
        event: Event = {"t": round(self.clock(), 3), "kind": kind, **fields}
        append_line(self.path, event)
        for sink in self.sinks:
            sink(event)
        return event


def stage_events(stage_dir: str | os.PathLike[str]) -> Iterator[Event]:
    """Events of all attempts of a stage as one history: a later attempt replaces steps past its start. What a person
    was told of them stays.

    Each event gains `attempt`.
    """
    numbers = {p.name.removeprefix("attempt_"): p for p in Path(stage_dir).glob("attempt_*")}
    attempts = sorted((int(n), p) for n, p in numbers.items() if n.isdecimal())
    histories = [(n, [e for e in read_lines(p / "events.jsonl") if isinstance(e, dict)]) for n, p in attempts]
    starts = []
    for _, events in histories:
        first = next((e for e in events if e.get("kind") == "stage_start"), None)
        starts.append(first["step"] if first else None)
    for i, (number, events) in enumerate(histories):
        later = [s for s in starts[i + 1 :] if s is not None]
        cut = min(later) if later else None
        for event in events:
            step = event.get("step")
            if cut is not None and step is not None and step > cut and event.get("kind") not in HAPPENED:
                continue
            yield {**event, "attempt": number}
