"""The tables of the report page, as rows of plain values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cpt.base.events import Event
from cpt.base.files import read_json
from cpt.evaluate import Account
from cpt.plan.types import StagePlan, Train
from cpt.report import law_outcome, show
from cpt.report.history import RunHistory
from cpt.stages.attempt import attempts
from cpt.stages.guard import guard_text
from cpt.stages.state import State

REPLAY = " (replay)"
MOST_MATTERS = 200


class Colours:
    """One colour a source, the same in every chart and table; its replay has the same."""

    def __init__(self, run: RunHistory) -> None:
        self._known = {name: i for i, name in enumerate(run.plan.sources)}

    def of(self, source: str) -> int:
        """Index of the colour of a source or of its replay."""
        name = source.removesuffix(REPLAY)
        return self._known.setdefault(name, len(self._known))

    def ordered(self, sources: Iterable[str]) -> list[str]:
        """Sources in the order of their colours, each before its replay; those that the plan lacks last, by name."""
        return sorted(sorted(sources), key=lambda s: (self.of(s), s.endswith(REPLAY)))


def loss_rows(account: Account) -> list[dict[str, Any]]:
    """Gained and forgotten by source, with bars whose length is the share of the largest change."""
    largest = max((abs(c.nats) for c in account.changes), default=0.0) or 1.0
    return [
        {
            "domain": c.domain,
            "role": c.role,
            "before": c.before.loss,
            "after": c.after.loss,
            "nats": c.nats,
            "bpb": c.bits_per_byte,
            "verdict": c.verdict,
            "noise": c.noise,
            "bar": 50 * abs(c.nats) / largest,
        }
        for c in account.changes
    ]


def asked(train: Train) -> dict[str, float]:
    """Share of all tokens of a stage by source, replay named apart."""
    replay = train.replay
    part = replay.share if replay else 0.0
    total = sum(train.mixture.values()) or 1.0
    shares = {name: (1 - part) * share / total for name, share in train.mixture.items()}
    if replay and part:
        again = sum(replay.sources.values()) or 1.0
        shares |= {name + REPLAY: part * share / again for name, share in replay.sources.items()}
    return {name: share for name, share in shares.items() if share > 0}


def mixture_rows(run: RunHistory, colours: Colours) -> list[dict[str, Any]]:
    """For each train stage the shares that were asked for and those that were given; without proxies of laws."""
    found = []
    for name, stage in run.plan.stages.items():
        if stage.train is None or stage.group is not None:
            continue
        given = _last_given(run.events[name])
        total = sum(given.values())
        wanted = asked(stage.train)
        rows = [
            {
                "source": source,
                "colour": colours.of(source) % 8,
                "replay": source.endswith(REPLAY),
                "asked": wanted.get(source, 0.0),
                "given": given.get(source, 0.0) / total if total else None,
                "tokens": given.get(source, 0.0),
                "epochs": _epochs(run, source, given.get(source, 0.0)),
            }
            for source in dict.fromkeys([*wanted, *given])
        ]
        found.append({"stage": name, "rows": rows, "tokens": total})
    return found


def _last_given(events: tuple[Event, ...]) -> dict[str, float]:
    for event in reversed(events):
        if event.get("kind") == "step" and isinstance(event.get("given"), dict):
            return {str(k): float(v) for k, v in event["given"].items() if isinstance(v, int | float)}
    return {}


def _epochs(run: RunHistory, source: str, tokens: float) -> float | None:
    known = run.plan.sources.get(source.removesuffix(REPLAY))
    return tokens / known.facts.tokens if known and known.facts and known.facts.tokens else None


def stage_rows(run: RunHistory) -> list[dict[str, Any]]:
    """The stages as links from parent to child; the proxies of a law are told with it."""
    return [_stage_row(run, name, stage) for name, stage in run.plan.stages.items() if stage.group is None]


def _stage_row(run: RunHistory, name: str, stage: StagePlan) -> dict[str, Any]:
    train, state = stage.train, run.states[name]
    start = "scratch" if stage.parent is None else stage.parent
    at = f"@{stage.parent_at}" if stage.parent_at is not None else ""
    keeps = ", ".join(stage.keep) or "nothing"
    return {
        "name": name,
        "kind": stage.kind,
        "status": state.status,
        "shown": "ended by its guard" if state.status == "failed" and state.guard else state.status,
        "reason": state.reason,
        "reused": state.reference,
        "from": f"{start}{at}" + (f", keeps {keeps}" if stage.parent is not None and train else ""),
        "tokens": show.show_count(train.tokens) if train else "",
        "steps": f"{train.steps:,}" if train else "",
        "lr": " → ".join(show.lr(x) for x in train.lr.points) if train else "",
        "schedule": train.lr.schedule if train else law_words(run, stage) or options(stage.options),
        "mixture": ", ".join(f"{s} {show.share(x)}" for s, x in asked(train).items()) if train else "",
        "layout": _layout(train) if train else "",
    }


def law_words(run: RunHistory, stage: StagePlan) -> str:
    """What a law stage stands on, and how far its proxies are; empty for other stages."""
    if stage.kind != "law":
        return ""
    proxies = [n for n, s in run.plan.stages.items() if s.group == stage.name and s.train is not None]
    if not proxies:
        return f"{stage.options['law']} from a file"
    done = sum(run.states[n].status == "done" for n in proxies)
    return f"{stage.options['law']} for {stage.options['target']}, {done} of {len(proxies)} proxies done"


def options(given: Mapping[str, Any]) -> str:
    """Options of a stage that does not train, in one line."""
    return ", ".join(f"{key} {value}" for key, value in given.items())


def _layout(train: Train) -> str:
    p = train.parallel
    return f"tp {p.tp} × pp {p.pp} × dp {p.dp}, {train.precision}"


def time_rows(run: RunHistory) -> list[dict[str, Any]]:
    """Where the time of each stage went; the proxies of a law are one line."""
    found: list[dict[str, Any]] = []
    together: dict[str, dict[str, Any]] = {}
    for name, stage in run.plan.stages.items():
        attempts: dict[int, list[float]] = {}
        spent = {"eval": 0.0, "save": 0.0}
        tokens = 0.0
        for event in run.events[name]:
            kind = event.get("kind")
            if isinstance(event.get("t"), int | float):
                attempts.setdefault(int(event.get("attempt", 1)), []).append(float(event["t"]))
            if kind in spent and isinstance(event.get("seconds"), int | float):
                spent[kind] += float(event["seconds"])
            if kind == "step" and isinstance(event.get("tokens"), int | float):
                tokens = max(tokens, float(event["tokens"]))
        if not attempts or stage.train is None:
            continue
        wall = sum(max(times) - min(times) for times in attempts.values())
        row: dict[str, Any] = {"name": name, "attempts": len(attempts), "wall": wall, **spent, "tokens": tokens}
        if stage.group is None:
            found.append(row)
        elif stage.group not in together:
            together[stage.group] = {**row, "name": f"proxies of {stage.group}"}
            found.append(together[stage.group])
        else:
            sums = together[stage.group]
            sums |= {key: sums[key] + row[key] for key in ("attempts", "wall", "eval", "save", "tokens")}
    for row in found:
        row["train"] = max(0.0, row["wall"] - row["eval"] - row["save"])
        row["speed"] = row["tokens"] / row["wall"] if row["wall"] > 0 else None
    return found


def matters(run: RunHistory) -> list[dict[str, str]]:
    """Warnings, notes, skipped updates, stops, resumes, guards and failures, in order; the newest when there are very
    many.
    """
    found: list[tuple[float, dict[str, str]]] = []
    for stage, events in run.events.items():
        warned = {event.get("step") for event in events if event.get("kind") == "warning"}
        told: set[tuple[str, ...]] = set()  # a step that is made again is warned of again
        for event in events:
            text = _matter(event)
            if text is None or tuple(text.values()) in told:
                continue
            # A skipped update, or the steps that a rollback left out, are warned of already; the bare mark counts where
            # there was no warning.
            if text["what"] == "skipped" and event.get("left_out", event.get("step")) in warned:
                continue
            if text["what"] == "note" and run.plan.stages[stage].kind == "law":
                continue  # the law has a part of the page
            told.add(tuple(text.values()))
            t = event.get("t")
            found.append((float(t) if isinstance(t, int | float) else 0.0, {"stage": stage, **text}))
    for stage, state in run.states.items():
        found += _ended_attempts(stage, run.homes[stage], state)
        if state.status == "failed":
            found.append((state.updated, {"stage": stage, "what": "failed", "text": state.reason, "step": ""}))
    said = {(row["stage"], row["text"]) for _, row in found}  # a law's stage has logged its strong warnings itself
    found += [one for one in law_outcome.warnings(run) if (one[1]["stage"], one[1]["text"]) not in said]
    found.sort(key=lambda pair: pair[0])
    return [{**row, "t": show.moment(t) if t else ""} for t, row in found[-MOST_MATTERS:]]


def _ended_attempts(stage: str, home: Path, state: State) -> Iterator[tuple[float, dict[str, str]]]:
    """Attempts that failed and were followed by another one, or left something to go on from."""
    for folder in attempts(home):
        number = folder.name.removeprefix("attempt_")
        path = folder / "failure.json"
        if state.status == "failed" and int(number) == state.attempt:
            continue  # the stage's own failure
        with contextlib.suppress(OSError, ValueError, AttributeError):
            failure = read_json(path)
            at = failure.get("step")
            row = {"stage": stage, "what": "failed", "step": f"{at:,}" if isinstance(at, int) else ""}
            yield path.stat().st_mtime, {**row, "text": show.plain(f"attempt {number}: {failure.get('error', '')}")}


def _matter(event: Event) -> dict[str, str] | None:
    kind, step = event.get("kind"), event.get("step")
    at = f"{step:,}" if isinstance(step, int) else ""
    if kind in ("warning", "note"):
        return {"what": kind, "step": at, "text": show.plain(event.get("text", ""))}
    if kind == "step" and event.get("skipped"):
        return {"what": "skipped", "step": at, "text": show.plain(event["skipped"])}
    if kind == "stop":
        return {"what": "stop", "step": at, "text": show.plain(event.get("reason", ""))}
    if kind == "guard":
        return {"what": "guard", "step": at, "text": show.plain(guard_text(event))}
    if kind == "stage_start" and event.get("resumed"):
        return {"what": "resume", "step": at, "text": f"attempt {event.get('attempt', '')} goes on"}
    return None
