"""`cpt report`: one self-contained HTML page about a run, made from its plan and events at any time.

Everything a run wrote (names, messages, commands) is text of unknown origin: jinja2 escapes it, and no part of the page
is put together from it in another way. The page has no scripts and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpt.base.errors import UsageError
from cpt.base.files import read_json, write_atomic
from cpt.plan.types import StagePlan
from cpt.report import law_outcome, show
from cpt.report.charts import Chart, Series, chart
from cpt.report.history import RunHistory, read_run
from cpt.report.sections import REPLAY, Colours, loss_rows, matters, mixture_rows, stage_rows, time_rows
from cpt.report.table import summary

NAME = "report.html"


def write_page(run_dir: Path, out: Path | None = None) -> Path:
    """Write the page of a run and give its path.

    Args:
        run_dir: the run's folder.
        out: where to write; without it `report.html` in the run's folder.
    """
    path = out or run_dir / NAME
    try:
        write_atomic(path, render(read_run(run_dir), path.parent))
    except (NotADirectoryError, IsADirectoryError):
        raise UsageError(f"`{path}` cannot be written: it is a folder, or lies in a file") from None
    return path


def render(run: RunHistory, at: Path | None = None) -> str:
    """The page as HTML.

    Args:
        at: the folder it will lie in; None = that of the run.
    """
    return fill("report.html", content(run) | {"laws": law_outcome.rows(run, at or run.folder)})


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A template of this package with values, all of which are escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def content(run: RunHistory) -> dict[str, Any]:
    """All that the page shows, as plain values."""
    places = _places(run)
    colours = Colours(run)
    account = run.account
    return {
        "name": show.plain(run.plan.name, 120),
        "facts": _facts(run),
        "charts": [c for c in (_valid(run, places, colours), _train(run, places, colours)) if c],
        "rate_charts": [c for c in (_lr(run, places), _speed(run, places)) if c],
        "account": account,
        "against": account.before.replace("`", ""),
        "losses": loss_rows(account),
        "summary": summary(account),
        "gaps": [(stage, domain, gap) for stage, domains in account.gaps.items() for domain, gap in domains.items()],
        "matrix": _matrix(run),
        "mixture": mixture_rows(run, colours),
        "stages": stage_rows(run),
        "times": time_rows(run),
        "matters": matters(run),
        "command": show.plain(run.command, 2000),
        "environment": _environment(run),
        "show": show,
    }


def _places(run: RunHistory) -> dict[str, float]:
    """Where each train stage begins along the x axis [tokens]; proxies of laws are not drawn."""
    places, at = {}, 0.0
    for name, stage in run.plan.stages.items():
        if stage.train and stage.group is None:
            places[name] = at
            at += stage.train.tokens
    return places


def _spans(run: RunHistory, places: dict[str, float]) -> list[tuple[str, float, float]]:
    return [(show.plain(name, 60), x, x + _tokens(run.plan.stages[name])) for name, x in places.items()]


def _tokens(stage: StagePlan) -> int:
    return stage.train.tokens if stage.train else 0


def _valid(run: RunHistory, places: dict[str, float], colours: Colours) -> Chart | None:
    pieces: dict[str, list[list[tuple[float, float]]]] = {}
    for name, x in places.items():
        for domain, points in _evaluations(run, name).items():
            begin = [] if points[0][0] == 0 else _end_of_parent(run, name, domain)
            pieces.setdefault(domain, []).append([(x + t, loss) for t, loss in [*begin, *points]])
    series = [
        Series(label=show.plain(d, 60), colour=colours.of(d), pieces=pieces[d], dots=True)
        for d in colours.ordered(pieces)
    ]
    top, cut = _top(run, pieces)
    caption = "Held-out text, never trained on. " + (
        f"The first points lie above the picture, up to {cut:.2f}." if cut else ""
    )
    return chart("Validation loss by source", "nats/token", series, _spans(run, places), top=top, caption=caption)


def _end_of_parent(run: RunHistory, stage: str, domain: str) -> list[tuple[float, float]]:
    """Where the line of a stage begins that was not measured at its start, because its parent's end just had been."""
    part = run.plan.stages[stage]
    parent = run.plan.stages.get(part.parent or "")
    if parent is None or parent.train is None or part.parent_at is not None:
        return []
    points = _evaluations(run, parent.name).get(domain, [])
    return [(0.0, points[-1][1])] if points and points[-1][0] == parent.train.tokens else []


def _evaluations(run: RunHistory, stage: str) -> dict[str, list[tuple[float, float]]]:
    from cpt.evaluate import measurements

    found: dict[str, dict[float, float]] = {}
    for m in measurements(run.events[stage]):
        for domain, loss in m.losses.items():
            found.setdefault(domain, {})[float(m.tokens)] = loss.loss
    return {domain: sorted(points.items()) for domain, points in found.items()}


def _top(run: RunHistory, pieces: dict[str, list[list[tuple[float, float]]]]) -> tuple[float | None, float | None]:
    """Upper end of a loss chart: the untrained start of a run from scratch would press all else to the floor."""
    points = [p for parts in pieces.values() for part in parts for p in part]
    first = next((s.train for s in run.plan.stages.values() if s.train and s.group is None), None)
    if run.plan.base.kind != "scratch" or first is None or not points:
        return None, None
    later = [y for x, y in points if x >= 0.2 * first.tokens]
    highest = max(y for _, y in points)
    if len(later) < 2 or max(later) > 0.85 * highest:
        return None, None
    return max(later), highest


def _train(run: RunHistory, places: dict[str, float], colours: Colours) -> Chart | None:
    pieces: dict[str, list[list[tuple[float, float]]]] = {}
    for name, x in places.items():
        own: dict[str, list[tuple[float, float]]] = {}
        for event in run.events[name]:
            losses = event.get("losses")
            if event.get("kind") == "step" and isinstance(losses, dict):
                for source, loss in losses.items():
                    if isinstance(loss, int | float):
                        own.setdefault(str(source), []).append((x + _num(event.get("tokens")), float(loss)))
        for source, points in own.items():
            pieces.setdefault(source, []).append(points)
    series = [
        Series(label=show.plain(s, 60), colour=colours.of(s), pieces=pieces[s], dashed=s.endswith(REPLAY))
        for s in colours.ordered(pieces)
    ]
    top, _ = _top(run, pieces)
    return chart("Training loss by source", "nats/token", series, _spans(run, places), top=top)


def _lr(run: RunHistory, places: dict[str, float]) -> Chart | None:
    from cpt.schedules import curve

    planned, real = [], []
    for name, x in places.items():
        train = run.plan.stages[name].train
        assert train is not None
        at, per_step = curve(train.lr), train.tokens / max(1, train.steps)
        every = max(1, train.steps // 400)
        steps = [*range(0, train.steps, every), train.steps - 1]
        planned.append([(x + n * per_step, at(n)) for n in steps])
        points = [
            (x + _num(e.get("tokens")) - per_step, float(e["lr"]))
            for e in run.events[name]
            if e.get("kind") == "step" and isinstance(e.get("lr"), int | float)
        ]
        if points:
            real.append(points)
    series = [Series(label="planned", colour=7, pieces=planned, dashed=True)]
    if real:
        series.append(Series(label="as it was", colour=0, pieces=real))
    return chart("Learning rate", "lr", series, _spans(run, places), from_zero=True)


def _speed(run: RunHistory, places: dict[str, float]) -> Chart | None:
    pieces = []
    for name, x in places.items():
        points = [
            (x + _num(e.get("tokens")), float(e["tokens_per_s"]))
            for e in run.events[name]
            if e.get("kind") == "step" and isinstance(e.get("tokens_per_s"), int | float)
        ]
        if points:
            pieces.append(points)
    series = [Series(label="tokens a second", colour=2, pieces=pieces)] if pieces else []
    return chart("Throughput", "tokens/s", series, _spans(run, places), from_zero=True)


def _facts(run: RunHistory) -> list[tuple[str, str]]:
    plan = run.plan
    done = sum(s.status == "done" for s in run.states.values())
    times = [float(e["t"]) for events in run.events.values() for e in events if isinstance(e.get("t"), int | float)]
    given = 0
    for name, events in run.events.items():
        steps = [_num(e.get("tokens")) for e in events if e.get("kind") == "step"]
        given += int(max(steps, default=0)) if plan.stages[name].train else 0
    ends = [
        f", {name} {'was ended by its guard' if s.guard else 'failed'}"
        for name, s in run.states.items()
        if s.status == "failed"
    ]
    facts = [("state", show.plain(f"{done} of {len(plan.stages)} stages done{''.join(ends)}"))]
    facts.append(
        ("tokens", f"{show.show_count(given)} of {show.show_count(sum(_tokens(s) for s in plan.stages.values()))}")
    )
    if plan.model:
        facts.append(("model", f"{plan.model.family}, {show.show_count(plan.model.num_parameters)} parameters"))
    base = {"scratch": "from scratch"}.get(plan.base.kind, f"from {plan.base.path}")
    facts.append(("base", show.plain(base)))
    facts.append(("recipe", show.plain(plan.recipe)))
    facts.append(("plan", plan.id[:6]))
    if times:
        facts.append(("started", show.moment(min(times))))
        facts.append(("from the first event to the last", show.show_duration(max(times) - min(times))))
    return facts


def _matrix(run: RunHistory) -> dict[str, Any] | None:
    """Losses after each stage, each with its change against the row that changes count from."""
    account = run.account
    shown = [*account.rows, *account.beside]
    if not shown:
        return None
    measured = dict.fromkeys(d for row in shown for d in row.losses)
    domains = [*(d for d in run.plan.sources if d in measured), *(d for d in measured if d not in run.plan.sources)]
    base = account.rows[account.compared_with].losses if account.rows else {}
    rows = []
    for i, row in enumerate(shown):
        cells = []
        for d in domains:
            loss, first = row.losses.get(d), base.get(d)
            moved = loss.loss - first.loss if loss and first and i > account.compared_with else None
            noise = 2 * max(loss.stderr, first.stderr) if loss and first else 0.0
            way = "" if moved is None or abs(moved) <= max(noise, 0.0005) else "up" if moved > 0 else "down"
            cells.append({"loss": loss.loss if loss else None, "moved": moved, "way": way})
        rows.append({"label": row.label, "cells": cells, "base": i == account.compared_with})
    return {"domains": domains, "rows": rows}


def _environment(run: RunHistory) -> list[tuple[str, str]]:
    """Versions and machine, as the run recorded them."""
    try:
        found = read_json(run.folder / "environment.json")
    except (OSError, ValueError):
        return []
    if not isinstance(found, dict):
        return []
    rows = [(key, found.get(key)) for key in ("cpt", "python", "host", "platform", "cores")]
    packages = found.get("packages")
    if isinstance(packages, dict):
        rows.append(("packages", ", ".join(f"{k} {v}" for k, v in packages.items() if v)))
    git = found.get("git")
    if isinstance(git, dict):
        rows.append(("code", f"{str(git.get('commit'))[:12]}{' with uncommitted changes' if git.get('diff') else ''}"))
    return [(key, show.plain(value)) for key, value in rows if value]


def _num(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
