"""What a law stage does: collect or read the table, fit, recommend, write `table.csv` and `law.json`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cpt.base.errors import DONE, UsageError
from cpt.base.events import EventLog
from cpt.base.files import write_atomic
from cpt.laws.analyse import analyse
from cpt.laws.law import LAWS
from cpt.laws.question import asked_size
from cpt.laws.result import Analysis, Warn
from cpt.laws.saved import SavedLaw
from cpt.laws.settings import Settings
from cpt.laws.table import DOMAIN, GENERAL, Table, read
from cpt.plan.types import Job, RunPlan
from cpt.stages.law import RESULT, LawStage, options_of
from cpt.stages.law_file import of_file
from cpt.stages.proxies import collect

TABLE = "table.csv"
CHECKED = ("dcpt", "l1", "mixing", "additive")  # laws that one loss after the other is fitted to
TIE = 0.1  # weight averages whose losses all lie within this are not ranked [nats/token]


def work(plan: RunPlan, job: Job) -> int:
    """Do it all in one process without torch; gives 0."""
    options = options_of(plan, job.stage)
    run_dir = Path(job.run_dir)
    folder = run_dir / "stages" / job.stage
    log = EventLog(folder / f"attempt_{job.attempt}" / "events.jsonl")
    start = log.clock()
    log.write("stage_start", stage=job.stage, attempt=job.attempt, step=0, steps=0, parent=job.parent, resumed=False)
    for name in (RESULT, TABLE):  # of an attempt before: what is there afterwards is from this one
        (folder / name).unlink(missing_ok=True)
    if options.file is not None:
        saved = of_file(options)
        if not saved.groups:
            refuse_foreign(saved.table, options)
        saved = with_groups(saved, options)
    else:
        saved = fitted(plan, job.stage, options, run_dir, log)
    write_atomic(folder / TABLE, saved.table.csv())
    saved.save(folder / RESULT)
    for text in dict.fromkeys(str(one["text"]) for one in saved.warnings if one.get("strong")):  # maybe of two losses
        log.write("warning", text=text, step=0)
    seconds = round(log.clock() - start, 3)
    log.write("law", **summary(saved), path=str(folder / RESULT), seconds=seconds)
    log.write("stage_end", step=0, tokens=0, seconds=seconds)
    return DONE


def fitted(plan: RunPlan, name: str, options: LawStage, run_dir: Path, log: EventLog) -> SavedLaw:
    """The law of a table of finished runs, or of what the proxies measured."""
    notes: tuple[str, ...] = ()
    if options.data is not None:
        table = given_table(options)
    else:
        collected = collect(plan, name, options, run_dir)
        table, notes = collected.table, collected.notes
    log.write("note", text=f"law `{name}` is fitted to {len(table)} measurements of {table.num_runs} runs")
    for text in notes:
        log.write("warning", text=text, step=0)
    merged = options.how == "merge" and options.data is None
    analysis = analyse(table, options.law, settings_of(options, table))
    if options.target_decays:
        analysis = _with(analysis, "decaying_target", _decays(options))
    saved = with_groups(SavedLaw.of(analysis), options)
    if merged:
        text = "losses are of weight averages, which lie above those of runs: trust the ranking more than the values"
        saved = with_ties(dataclasses.replace(saved, warnings=(*saved.warnings, _plain(Warn("merged", text)))))
    return saved


def given_table(options: LawStage) -> Table:
    """The table in `data`, which the law of the stage can be fitted to as far as one sees without fitting.

    Raises:
        UsageError: it cannot be read, is about other sources, is too small, or lacks the loss that a limit is about.
    """
    assert options.data is not None
    table = read(options.data)
    refuse_foreign(table, options)
    settings = settings_of(options, table)
    limited = settings.tolerance is not None or settings.eps_g is not None
    if limited and len(table.shares) == 2 and GENERAL not in table.losses:
        raise UsageError(
            f"a tolerance limits the general loss, and `{table.name}` has no `loss_general`",
            "a column of that name gives it",
        )
    if limited and len(table.shares) == 2 and table.base_loss(GENERAL, settings.n_params) is None:
        raise UsageError(
            "the general loss before training is not known, so its rise cannot be limited",
            f"a row of 0 tokens in `{table.name}` gives it",
        )
    try:
        asked_size(table, settings)
    except UsageError as error:
        raise UsageError(error.message, "add runs of three sizes or more, or of the size of this model") from None
    if options.law != "auto":
        LAWS.get(options.law)
    if options.law in CHECKED and table.shares:
        errors = []
        for name in table.losses:
            try:
                LAWS.get(options.law).for_rows(table.rows(name))
            except UsageError as error:
                errors.append(error)
        if len(errors) == len(table.losses):
            raise errors[0]
    return table


def settings_of(options: LawStage, table: Table) -> Settings:
    """The question that a law stage asks.

    Raises:
        UsageError: a limit on the general loss is wanted, and the loss before training is not known.
    """
    sizes, lengths = table.n_params is not None, table.tokens is not None
    settings = Settings(
        n_params=float(options.target_params) if options.target_params and sizes else None,
        tokens=float(options.target_tokens) if options.target_tokens and lengths else None,
        bootstrap=options.draws,
        seed=options.seed,
    )
    if len(table.shares) <= 2:
        return dataclasses.replace(settings, tolerance=_tolerance(options), eps_g=options.eps_g)
    return dataclasses.replace(settings, goal=dict(options.domain), limits=_limits(options, table, settings.n_params))


def _tolerance(options: LawStage) -> float | None:
    return options.tolerance if options.eps_g is None else None


def _limits(options: LawStage, table: Table, n_params: float | None) -> dict[str, float]:
    """Highest loss allowed on each general source [nats/token]."""
    found = {}
    tolerance = _tolerance(options)
    for source in options.general if tolerance is not None or options.eps_g is not None else ():
        base = table.base_loss(source, n_params)
        if base is None:
            raise UsageError(
                f"the loss on `{source}` before training is not known, so its rise cannot be limited",
                "a row of 0 tokens in the table gives it, or `tolerance: null` sets no limit",
            )
        found[source] = base * (1 + tolerance) if tolerance is not None else base + (options.eps_g or 0.0)
    return found


def refuse_foreign(table: Table, options: LawStage) -> None:
    """A given table or law must be about the run's own sources.

    Raises:
        UsageError: it is about corpora that the run does not have.
    """
    known = [*options.domain, *options.general]
    foreign = [c for c in table.corpora if c not in known and c not in (DOMAIN, GENERAL)]
    if known and foreign:
        named = ", ".join(f"`{s}`" for s in known)
        raise UsageError(f"`{table.name}` is about `{foreign[0]}`, and the sources of this law are {named}")


def with_groups(saved: SavedLaw, options: LawStage) -> SavedLaw:
    """The law with the sources that `domain` and `general` stand for; one that names them itself keeps its own."""
    if saved.groups or set(saved.table.corpora) != {DOMAIN, GENERAL}:
        return saved
    groups = {DOMAIN: dict(options.domain), GENERAL: dict(options.general)}
    return dataclasses.replace(saved, groups={name: shares for name, shares in groups.items() if shares})


def with_ties(saved: SavedLaw) -> SavedLaw:
    """A law of weight averages, unfit where they all have about the same loss and so cannot be ranked."""
    reasons = []
    for name, values in saved.table.losses.items():
        known = values[values == values]
        spread = float(known.max() - known.min())
        if spread < TIE:
            reasons.append(
                f"the {name} losses of all averages lie within {spread:.3f} nats ({known.min():.3f} to "
                f"{known.max():.3f}): too close to rank, below {TIE:g}"
            )
    return dataclasses.replace(saved, unfit=(*saved.unfit, *reasons))


def summary(saved: SavedLaw) -> dict[str, object]:
    """What an event says about a fitted law."""
    heldout = [t.heldout for t in saved.targets.values() if t.heldout is not None]
    found = {k: v for k, v in saved.values().items() if k not in ("law", "verdict")}
    return {
        "law": saved.law,
        "verdict": saved.verdict,
        "reasons": list(saved.unfit),
        "no_recommendation": saved.no_recommendation,
        "runs": saved.table.num_runs,
        "rows": len(saved.table),
        "heldout": max(heldout) if heldout else None,
        "values": found,
    }


def _decays(options: LawStage) -> str:
    return (
        f"the lr of `{options.target}` decays and that of the proxies does not: the law is for a constant lr, so "
        f"losses of `{options.target}` may differ from what it predicts"
    )


def _with(analysis: Analysis, kind: str, text: str) -> Analysis:
    return dataclasses.replace(analysis, warnings=(*analysis.warnings, Warn(kind, text)))


def _plain(warn: Warn) -> dict[str, object]:
    return dataclasses.asdict(warn)
