"""A plan for a person: what each stage does, what it reads, what it costs, what looks wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cpt.launch import launcher_of
from cpt.launch.batch import Batch
from cpt.plan.budget import Budget, proxy_cost
from cpt.plan.check import passes, tokens_by_source
from cpt.plan.types import Replay, RunPlan, StagePlan, Train
from cpt.report import show
from cpt.report.table import aligned
from cpt.stages import send
from cpt.stages.attempt import work_of

ABOUT = "≈"


def plan_text(plan: RunPlan, budget: Budget | None, warnings: Sequence[str], next_command: str | None = None) -> str:
    """The plan as text.

    Args:
        plan: checked.
        budget: its cost; None leaves the line out.
        warnings: one sentence each.
        next_command: what to type next.
    """
    parts = [_head(plan), aligned(_stage_rows(plan), right=(1, 2))]
    rows = _source_rows(plan)
    if len(rows) > 1:
        parts.append(aligned(rows, right=(2, 3, 4, 5)))
    others = _other_stages(plan)
    if others:
        parts.append(others)
    jobs = _job_rows(plan)
    if jobs:
        parts.append(aligned(jobs))
    if budget is not None:
        parts.append(_needs(plan, budget))
    if warnings:
        parts.append([f"warning: {show.plain(w)}" for w in warnings])
    if next_command:
        parts.append([f"next    `{next_command}`"])
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in parts) + "\n"


def _head(plan: RunPlan) -> list[str]:
    trains = [s.train for s in plan.stages.values() if s.train is not None]
    prepared = _prepared(plan)
    mark = "" if prepared else ABOUT
    own = [s for s in plan.stages.values() if s.group is None]
    proxies = sum(s.group is not None and s.train is not None for s in plan.stages.values())
    count = f"{len(own)} stage" + ("s" if len(own) != 1 else "")
    count += f" and {proxies} proxies" if proxies else ""
    tokens = show.show_count(sum(t.tokens for t in trains))
    lines = [f"plan    {show.plain(plan.recipe)} · {count} · {tokens} tokens · id {mark}{plan.short_id}"]
    lines.append(f"base    {_base(plan)}")
    lines.append(f"run     {plan.runs}/{plan.name}")
    lines.append(f"cache   {plan.cache}")
    for folder, made in plan.conversions.items():
        there = Path(folder).is_dir()
        what = "converted already" if there else f"converted first, {show.show_bytes(made.bytes)}"
        lines.append(f"convert {_place(plan, folder)}: {made.shown} → native, {what}")
    if not prepared:
        lines.append(
            f"data    not prepared yet: sizes with {ABOUT} are estimates, and the id will change; the run prepares it"
        )
    return lines


def _base(plan: RunPlan) -> str:
    model = plan.model
    shape = ""
    if model is not None:
        shape = f"{show.show_count(model.num_parameters)} parameters, vocabulary {model.vocab_size:,}"
    if plan.base.kind == "scratch":
        family = f"a new {model.family} model of " if model is not None else ""
        tokenizer = plan.tokenizer
        own = f", tokenizer trained on {', '.join(tokenizer.train_on)}" if tokenizer.train_on else ""
        return f"scratch: {family}{shape}{own}"
    path = plan.base.path or ""
    kind = {"hf": "Hugging Face format", "native": "native format"}[plan.base.kind]
    if path in plan.conversions:
        kind = plan.conversions[path].shown
    return f"{_place(plan, path)}, {kind}, {shape}"


def _place(plan: RunPlan, path: str) -> str:
    """A checkpoint folder in short: its name, or run, stage and step of one of our own."""
    folder = Path(plan.conversions[path].source if path in plan.conversions else path)
    step = folder.name.removeprefix("iter_")
    if step.isdigit() and folder.parent.name == "checkpoints" and folder.parents[2].name == "stages":
        return show.plain(f"{folder.parents[3].name}/{folder.parents[1].name}@{int(step)}")
    if step.isdigit() or folder.name == "release":  # of a step, the folder of all steps says which checkpoint it is
        return show.plain(folder.parent.name + (f"@{int(step)}" if step.isdigit() else ""))
    return show.plain(folder.name)


def _stage_rows(plan: RunPlan) -> list[list[str]]:
    rows = [["stage", "tokens", "steps", "lr: start → peak → end", "schedule", "layout", "starts from"]]
    for stage in plan.stages.values():
        train = stage.train
        if stage.group is not None:
            continue  # told with its law
        if train is None:
            proxies = show.show_count(found) if (found := proxy_cost(plan, stage.name).tokens) else ""
            rows.append([stage.name, proxies, "", "", stage.kind, "", _parent(plan, stage)])
            continue
        lr = " → ".join(show.lr(v) for v in train.lr.points)
        layout = train.parallel
        shown = " ".join(f"{k} {v}" for k, v in (("tp", layout.tp), ("pp", layout.pp), ("dp", layout.dp)) if v > 1)
        rows.append(
            [
                stage.name,
                show.show_count(train.tokens),
                f"{train.steps:,}",
                lr,
                train.lr.schedule,
                shown or "1 rank",
                _parent(plan, stage),
            ]
        )
    return rows


def _parent(plan: RunPlan, stage: StagePlan) -> str:
    """Where a stage starts and what it keeps, in words."""
    if stage.parent is None:
        return "scratch"
    name = stage.parent if stage.parent == "base" or stage.parent in plan.stages else _place(plan, stage.parent)
    if stage.parent_at is not None:
        name = f"{name}@{stage.parent_at}"
    if stage.train is None:
        return show.plain(name)
    words = {"optimizer": "its optimizer", "cursor": "reads on", "lr": "its lr", "rng": "its random state"}
    kept = [text for key, text in words.items() if key in stage.keep]
    if "optimizer" not in stage.keep:
        kept.insert(0, "new optimizer")
    return ", ".join([show.plain(name), *kept])


def _source_rows(plan: RunPlan) -> list[list[str]]:
    """One line for each stage, source and role, with the passes over the corpus at the stage's end."""
    rows = [["stage", "source", "tokens", "share", "corpus", "passes so far", ""]]
    for stage in plan.stages.values():
        if stage.train is None or stage.group is not None:
            continue
        count = passes(plan, stage)
        for i, ((name, role), tokens) in enumerate(tokens_by_source(stage.train).items()):
            law = _law(stage, name, role)
            about = ABOUT if law and stage.assumed else ""
            facts = plan.sources[name].facts
            mark = ABOUT if facts is None or facts.estimated else ""
            rows.append(
                [
                    stage.name if i == 0 else "",
                    show.plain(name),
                    f"{about}{show.show_count(tokens)}",
                    f"{about}{show.share(tokens / stage.train.tokens)}",
                    f"{mark}{show.show_count(facts.tokens)}" if facts else "?",
                    f"{mark or about}{_passes(count.get(name, 0.0))}",
                    ", ".join(filter(None, [_role(plan, stage.train) if role == "replay" else "", law])),
                ]
            )
    return rows


def _law(stage: StagePlan, source: str, role: str) -> str:
    """That a law gives the share of a source of a stage; `≈` until it does."""
    keys = ["replay.share"] if role == "replay" else ["replay.share", "mixture", f"mixture.{source}"]
    laws = dict.fromkeys(stage.law[key].partition(".")[0] for key in keys if key in stage.law)
    return f"{ABOUT + ' ' if stage.assumed else ''}from law `{'`, `'.join(laws)}`" if laws else ""


def _passes(count: float) -> str:
    return f"{count:.2f}" if count < 100 else f"{count:,.0f}"


def _role(plan: RunPlan, train: Train) -> str:
    """Whose data is replayed; of a base that others trained, sources only stand in for it."""
    replay = train.replay
    assert replay is not None
    if replay.of == "base" and plan.base.kind != "scratch":
        return f"stand-in replay of base{_extra(replay)}"
    return f"replay of {show.plain(replay.of)}{_extra(replay)}"


def _extra(replay: Replay) -> str:
    return f", on top: {1 / (1 - replay.share):.2f} × the compute" if replay.account == "additive" else ""


def _other_stages(plan: RunPlan) -> list[str]:
    """Guards and stages that do not train, a line each."""
    lines = []
    for stage in plan.stages.values():
        if stage.train is not None and stage.train.stop_if is not None:
            guard, rise = stage.train.stop_if, show.share(stage.train.stop_if.loss_rises)
            lines.append(f"guard   {stage.name} ends the run when the loss of {guard.source} rises by {rise}")
        if stage.kind == "law":
            lines += _law_lines(plan, stage)
        elif stage.train is None and stage.group is None:
            said = ", ".join(f"{k} {_short(v)}" for k, v in stage.options.items() if v not in (None, "auto", False))
            lines.append(f"{stage.kind:<7} {stage.name}: {said}")
    return [show.plain(line) for line in lines]


def _job_rows(plan: RunPlan) -> list[list[str]]:
    """With a queue: the jobs, what each asks for and what it waits for. The proxies of a law are one array."""
    launcher = launcher_of(plan.launcher)
    if not isinstance(launcher, Batch):
        return []

    def label(name: str) -> str:
        stage = plan.stages[name]
        if stage.group is None or stage.train is None:
            return show.plain(name)
        count = sum(s.group == stage.group and s.train is not None for s in plan.stages.values())
        return f"{count} proxies of {show.plain(stage.group)}"

    rows: dict[str, list[str]] = {}
    for name, stage in plan.stages.items():
        after = dict.fromkeys(label(n) for n in send.needs(plan, stage))
        work = work_of(stage, Path(plan.runs) / plan.name, Path.cwd())
        rows[label(name)] = [label(name), launcher.describe(work), ", ".join(after) or "at once"]
    return [["job", "asks for", "starts after"], *rows.values()]


def time_warnings(plan: RunPlan, budget: Budget) -> list[str]:
    """With a queue: the stages that need longer than all of their jobs together, one sentence each."""
    launcher = launcher_of(plan.launcher)
    each = launcher.work_seconds if isinstance(launcher, Batch) else None
    if not isinstance(launcher, Batch) or each is None:
        return []
    starts, found = launcher.num_starts, []
    for name, cost in budget.stages.items():
        seconds = (cost.seconds or 0.0) + (cost.evaluating or 0.0)
        if plan.stages[name].group is None and seconds > starts * each:
            jobs = f"its {starts} jobs have" if starts > 1 else "its job has"
            found.append(
                f"stage `{name}` takes about {show.show_duration(seconds)}, and {jobs} {show.show_duration(each)} of "
                f"work{' each' if starts > 1 else ''}: it will stop there, saved, and wait for `cpt resume`"
            )
    return found


def _law_lines(plan: RunPlan, stage: StagePlan) -> list[str]:
    """What a law stage runs, what that costs, and what it is asked."""
    options, cost = stage.options, proxy_cost(plan, stage.name)
    proxies = [s for s in plan.stages.values() if s.group == stage.name and s.train is not None]
    if not proxies and options.get("answer"):
        return [f"law     {stage.name}: {options['answer']}"]
    if not proxies:
        place = options.get("file") or options.get("data")
        how = "as it is in" if options.get("file") else f"{options['law']}, fitted on"
        return [f"law     {stage.name}: {how} {Path(str(place)).name}"]
    each = show.show_count(max(s.train.tokens for s in proxies if s.train is not None))
    line = f"law     {stage.name}: {cost.count} proxies of {each} tokens, {show.show_count(cost.tokens)}"
    if cost.share is not None:
        line += (
            f", {show.share(cost.share)} of the real run's compute (6·N·D, at most {show.share(options['max_cost'])})"
        )
    sizes = [model.num_parameters for s in proxies if (model := plan.model_of(s)) is not None]
    several = [show.show_count(n) for n in sorted(set(sizes))]
    runs = f"sizes {', '.join(several)}; " if len(several) > 1 else ""
    if options.get("ratios"):
        domain = " + ".join(options["domain"])
        what = "weight averages with " if options["how"] == "merge" else ""
        runs += f"{what}{domain} {', '.join(f'{100 * r:g}' for r in options['ratios'])} %"
    else:
        what = "weight averages" if options["how"] == "merge" else "mixtures"
        runs += f"{len(options['mixtures'])} {what} of {len({**options['domain'], **options['general']})} sources"
    runs += f"; measured every {show.show_count(options['every'])} tokens" if options["how"] == "runs" else ""
    limit = f"{options['eps_g']} nats/token" if options.get("eps_g") is not None else None
    limit = show.share(options["tolerance"]) if options.get("tolerance") is not None else limit
    most = f"general loss at most {limit} above the base's" if limit else "no limit on the general loss"
    asked = f"{options['law']} for {options['target']}: {show.show_count(options['target_tokens'])} tokens, "
    return [line, f"        {runs}", f"        {asked}{most}"]


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k} {v}" for k, v in value.items() if k in ("tp", "pp", "dp"))
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _needs(plan: RunPlan, budget: Budget) -> list[str]:
    devices, memory = budget.devices, max(s.memory for s in budget.stages.values()) if budget.stages else 0.0
    whole = f" of {show.show_bytes(devices.memory)} memory at peak" if devices.memory else " memory at peak"
    if devices.kind == "cpu":
        place = f"{budget.num_devices} rank" + ("s" if budget.num_devices != 1 else "")
        if devices.cores is None:  # on nodes of a cluster
            whole = " memory at peak of each rank"
        else:
            place += f" on {devices.cores} core" + ("s" if devices.cores != 1 else "")
            memory *= budget.num_devices
    else:
        place = f"{budget.num_devices} GPU" + ("s" if budget.num_devices != 1 else "")
    fields = [place]
    if budget.seconds is not None:
        fields.append(f"about {show.show_duration(budget.seconds)}")
        if devices.kind == "gpu":
            fields.append(f"{budget.seconds / 3600 * budget.num_devices:,.1f} GPU-hours")
    fields.append(f"about {show.show_bytes(memory)}{whole}")
    count = sum(s.checkpoints for s in budget.stages.values())
    fields.append(f"{count} checkpoint{'s' if count != 1 else ''} of {show.show_bytes(budget.checkpoint_bytes)}")
    fields.append(f"{show.show_bytes(budget.disk)} disk")
    basis = "; ".join(dict.fromkeys(s.basis for s in budget.stages.values()))
    lines = [f"needs   {' · '.join(fields)}", f"        time: {show.plain(basis)}"]
    if budget.seconds is not None:
        start = budget.starting / max(1, len(plan.stages))
        lines[1] += f"; with evaluations and {start:.0f} s to start each stage"
        lines[1] += "" if _prepared(plan) else ", without preparing data"
    return lines


def _prepared(plan: RunPlan) -> bool:
    return all(s.facts is not None and not s.facts.estimated for s in plan.sources.values())
