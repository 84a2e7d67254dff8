"""`cpt fit-law`: fit a law to a table of runs and say which mixture it recommends."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpt.cli import law_keys as keys
from cpt.cli.flags import Json, Yes, note, result, result_json, warning

if TYPE_CHECKING:
    from cpt.laws.result import Analysis
    from cpt.laws.settings import Settings
    from cpt.laws.table import Table

KINDS: dict[str, keys.Kind] = {
    "data": keys.path,
    "law": keys.text,
    "where": keys.text,
    "columns": keys.names,
    "out": keys.path,
    "tolerance": keys.rise,
    "eps_g": keys.nats,
    "n_params": keys.amount,
    "tokens": keys.amount,
    "domain_tokens": keys.amount,
    "epochs": keys.amount,
    "budget": keys.amount,
    "compute": keys.amount,
    "ratio": keys.share,
    "penalty": keys.amount,
    "k1": keys.nats,
    "k2": keys.amount,
    "caps": keys.amounts,
    "limits": keys.amounts,
    "goal": keys.amounts,
    "bootstrap": keys.count,
    "seed": keys.count,
    "delta": keys.amount,
    "decaying_lr": keys.yes_or_no,
}
FAMILIES: dict[str, keys.Kind] = {"base_": keys.nats, "options.": keys.plain}
_OWN = {"data", "law", "where", "columns", "out"}

Keys = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value ...", help="`data=FILE` names the table.", show_default=False),
]


def command(
    overrides: Keys = None,
    json: Json = False,
    loss: Annotated[
        str, typer.Option("--loss", metavar="log|linear", help="Compare logarithms of losses, or the losses.")
    ] = "log",
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="Fit the other laws too.")] = True,
    force: Annotated[
        bool, typer.Option("--force", help="Answer also for model sizes that the table says nothing about.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With `recipe=`: show the plan of the runs and start nothing.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="With `recipe=`: start again in a new folder.")] = False,
    yes: Yes = False,
) -> int:
    """Fit a law that predicts losses from size, tokens and mixture, and say which share of domain data to use.

    \b
    data=runs.csv           one row a measurement: run, n_params, tokens, r_domain (or w_<corpus>),
                            loss_domain, loss_general (or loss_<corpus>); CSV, JSON lines, Parquet
    columns={r_domain: x}   names of your own
    where='step >= 3000 and top5_loss == 0'
    law=dcpt                chinchilla dcpt l1 cross_dcpt mixing cmr additive replay repeated, or auto
    tolerance=3% | eps_g=0.05      how far the general loss may rise, relative or in nats per token
    base_general=2.87 base_domain=1.84     losses before training, if no row has 0 tokens
    n_params=1.8B tokens=10B       the run that is asked about
    domain_tokens=1B epochs=2 budget=20B   limited domain data: how much of it there is
    compute=1e21 ratio=0.5         split a compute budget between size and tokens
    caps={web: 10B} limits={web: 3.1} goal={code: 1}     several corpora: tokens, losses, weights
    k1=2.1 k2=0.3           law=cross_dcpt: the probe of the domain that is asked about
    penalty=1000            law=cmr: weight of a general loss above its limit
    bootstrap=200 seed=0 delta=1e-3 options.NAME=VALUE decaying_lr=true
    out=FOLDER              law.json for `cpt predict` and recipes, pictures, law.html

    With `recipe=NAME` the small runs of the recipe's law stage are done first (or, if it has none, of one for its first
    stage with domain and general sources); the same command goes on after a stop. Keys of a law stage can then be
    written in short, `tokens=30M ratios=[0,0.25,0.5,1]`; all others are keys of the recipe.
    """
    texts = list(overrides or [])
    if any(one.strip().startswith("recipe=") for one in texts):
        from cpt.cli import proxy_grid

        return proxy_grid.command(texts, json=json, yes=yes, dry_run=dry_run, fresh=fresh)
    return _fit(keys.parse(texts, KINDS, FAMILIES, "cpt fit-law"), json, loss, compare, force)


def _fit(given: Mapping[str, Any], json: bool, loss: str, compare: bool, force: bool) -> int:
    from cpt.base.errors import UsageError
    from cpt.laws import table as tables
    from cpt.laws.analyse import analyse
    from cpt.laws.law import LAWS
    from cpt.report import law_text

    if "data" not in given:
        raise UsageError("no table was given", "`data=runs.csv` names one, `recipe=NAME` plans the runs for one")
    settings = _settings(given, loss, compare, force)
    if (law := given.get("law", "auto")) != "auto":
        LAWS.get(law)
    folder = _folder(given.get("out"))
    table = tables.read(given["data"], given.get("where"), given.get("columns"))
    for text in table.notes:  # before the errors that follow from a column that was not understood
        note(text)
    _refuse_unknown_corpora(table, given)
    _refuse_unanswerable(table, settings)
    law = given.get("law") or _usual(table)
    if sys.stderr.isatty():
        note(f"fitting `{law}` to {len(table)} rows, {settings.bootstrap} resamples")
    analysis = analyse(table, law, settings)
    files = _write(analysis, folder) if folder is not None else {}
    for text in analysis.notes:
        if text not in table.notes:
            note(text)
    for text in dict.fromkeys(one.text for one in analysis.warnings):
        warning(text)
    for reason in analysis.unfit:
        warning(f"`{analysis.law}` is unfit for use here: {reason}")
    if json:
        result_json(analysis.to_json() | ({"files": files} if files else {}))
    else:
        result(law_text.text(analysis, files))
    return 0


def _settings(given: Mapping[str, Any], loss: str, compare: bool, force: bool) -> Settings:
    from cpt.laws.settings import Settings

    plain = {k: v for k, v in given.items() if k not in _OWN and not k.startswith(tuple(FAMILIES))}
    return Settings(
        **plain,
        base_losses=keys.family(given, "base_"),
        options=keys.family(given, "options."),
        scale=loss,
        compare=compare,
        force=force,
    )


def _usual(table: Table) -> str:
    """The law that the columns call for."""
    return "dcpt" if len(table.shares) == 2 else "mixing" if table.shares else "chinchilla"


def _refuse_unknown_corpora(table: Table, given: Mapping[str, Any]) -> None:
    from cpt.base.registry import unknown

    for corpus in keys.family(given, "base_"):
        if corpus not in table.losses:
            error = unknown("key", f"base_{corpus}", [f"base_{name}" for name in table.losses])
            raise type(error)(error.message, *error.hints, f"`{table.name}` measures {_listed(table.losses)}")
    for key in ("caps", "limits", "goal"):
        known = table.shares if key == "caps" else table.losses
        for corpus in given.get(key, {}):
            if corpus not in known:
                error = unknown("corpus", corpus, known)
                raise type(error)(f"{error.message} in `{key}`", *error.hints)


def _refuse_unanswerable(table: Table, settings: Settings) -> None:
    """A limit on the general loss that cannot be placed is refused before minutes of fitting."""
    from cpt.base.errors import UsageError
    from cpt.laws.recommend.answer import general_limit
    from cpt.laws.table import GENERAL

    if (settings.tolerance is None and settings.eps_g is None) or len(table.shares) != 2:
        return
    if GENERAL not in table.losses:
        raise UsageError(
            "a tolerance limits the general loss, and `loss_general` is not in the table",
            "`domain_tokens=` asks for the best ratio for an amount of domain data, without a limit",
        )
    if not table.base:
        general_limit(settings.base_losses.get(GENERAL), settings.tolerance, settings.eps_g)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _folder(out: str | None) -> Path | None:
    from cpt.base.errors import UsageError

    if out is None:
        return None
    folder = Path(out)
    if folder.is_file() or folder.suffix == ".json":
        raise UsageError(f"`out` is a folder, and `{out}` names a file", "`law.json` is written into the folder")
    return folder


def _write(analysis: Analysis, folder: Path) -> dict[str, str]:
    """The saved law, its table, pictures and page; their paths by what they are."""
    from cpt.base.files import write_atomic
    from cpt.laws.saved import SavedLaw
    from cpt.report import law_page

    law = folder / "law.json"
    if law.exists():
        note(f"`{law}` is replaced")
    SavedLaw.of(analysis).save(law)
    write_atomic(folder / "table.csv", analysis.table.csv())
    return {"law": str(law), "table": str(folder / "table.csv"), "page": str(law_page.write(analysis, folder))}
