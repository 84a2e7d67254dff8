"""A fitted law as a file: `law.json` holds all that predictions and recommendations need, the measurements included.

    {"format": "cpt-law", "version": 1, "cpt": ..., "law": "dcpt", "equation": ..., "verdict": "fit" | "unfit",
     "unfit": [...], "corpora": [...], "groups": {corpus: {source: share inside}}, "settings": {...},
     "targets": {name: {"options": {...}, "parameters": [...], "theta": [[...], ...], "objective", "heldout", ...}},
     "table": {"name", "fingerprint", "columns": {quantity: name in the file}, "base": [...], "records": [{...}, ...]},
     "recommendation": {...} | null, "no_recommendation": ..., "values": {...}, "warnings": [...]}

`theta` holds a line of parameters in fitting space for each draw, the fit first; `values` is what `${law:STAGE.key}`
gives in a recipe.

Array suffixes: D draws (row 0 the fit), P parameters, R points.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt import __version__
from cpt.base.errors import CptError, UsageError
from cpt.base.files import read_json, write_json
from cpt.laws.law import LAWS, Law
from cpt.laws.result import plain
from cpt.laws.rows import Floats, Rows
from cpt.laws.rows import points as law_points
from cpt.laws.settings import Settings
from cpt.laws.table import DOMAIN, GENERAL, Base, Table

if TYPE_CHECKING:
    from cpt.laws.result import Analysis

FORMAT, VERSION = "cpt-law", 1


@dataclass(frozen=True, eq=False)
class SavedTarget:
    """The law of one loss.

    Args:
        name: the corpus, or `loss`.
        law: with the terms that the rows determined.
        theta_DP: row 0 the fit, then the resamples; in fitting space.
        rows: what it was fitted on.
        base: loss of the base model at the size that was asked about; None when unknown [nats/token].
        objective: of the fit.
        heldout: mean relative error on rows left out; None when nothing could be left out [fraction].
        in_sample: the same on the fit's own rows [fraction].
        lowest_share: below this share of the measured corpus the law does not hold; None when nobody looked [fraction].
        probe: `k1` and `k2` of the domain that is asked about, for laws over several domains.
    """

    name: str
    law: Law
    theta_DP: Floats
    rows: Rows
    base: float | None
    objective: float
    heldout: float | None
    in_sample: float | None
    lowest_share: float | None = None
    probe: Mapping[str, float] = field(default_factory=dict)

    def loss(self, points: Rows) -> Floats:
        """loss_DR at points [nats/token]; row 0 the fit."""
        with np.errstate(all="ignore"):
            return self.law.loss(self.theta_DP, points)[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class SavedLaw:
    """Everything about a fitted law that outlives the command that fitted it.

    Args:
        law: its name.
        table: what it was fitted on.
        settings: how it was fitted and asked.
        targets: by corpus.
        unfit: why it must not be used; empty when it may.
        recommendation: as in `--json`; None when nothing was asked that it can answer.
        no_recommendation: why there is none.
        groups: sources that each corpus stands for, with their shares inside it; empty = the corpora themselves.
        warnings: what the reader must know.
        cpt: version of the program that wrote it.
    """

    law: str
    table: Table
    settings: Settings
    targets: Mapping[str, SavedTarget]
    unfit: tuple[str, ...]
    recommendation: Mapping[str, Any] | None
    no_recommendation: str
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    warnings: tuple[Mapping[str, Any], ...] = ()
    cpt: str = __version__

    @classmethod
    def of(cls, analysis: Analysis, groups: Mapping[str, Mapping[str, float]] | None = None) -> SavedLaw:
        """What is kept of an analysis."""
        said = analysis.to_json()
        targets = {
            name: SavedTarget(
                name=name,
                law=f.law,
                theta_DP=f.theta_DP,
                rows=f.rows,
                base=f.base,
                objective=f.fit.objective,
                heldout=plain(f.heldout.error),
                in_sample=plain(f.own.mean),
            )
            for name, f in analysis.fits.items()
        }
        return cls(
            law=analysis.law,
            table=analysis.table,
            settings=analysis.settings,
            targets=targets,
            unfit=tuple(analysis.unfit),
            recommendation=plain(said["recommendation"]),
            no_recommendation=analysis.no_recommendation,
            groups={k: dict(v) for k, v in (groups or {}).items()},
            warnings=tuple(plain(said["warnings"])),
        )

    @property
    def verdict(self) -> str:
        """`fit` or `unfit`."""
        return "unfit" if self.unfit else "fit"

    @property
    def equation(self) -> str:
        """In plain text."""
        return next(iter(self.targets.values())).law.equation

    def predict(self, target: str, points: Rows) -> Floats:
        """loss_DR at points [nats/token]; row 0 the fit, the others its draws."""
        return self.targets[target].loss(points)

    def points(
        self,
        target: str,
        *,
        n_params: float | None = None,
        tokens: float | None = None,
        shares: Mapping[str, float] | None = None,
        **columns: float | None,
    ) -> Rows:
        """The point of one question, as the law of a target wants it.

        Args:
            shares: of every corpus [fraction].
            columns: `unique_tokens`, `base`, `k1`, `k2`.
        """
        corpora = self.table.corpora
        shares_RK = np.array([[shares[c] for c in corpora]]) if shares and corpora else None
        return law_points(
            n_params=n_params,
            tokens=tokens,
            share=(shares or {}).get(target),
            shares=shares_RK,
            corpora=corpora,
            **columns,
        )

    def values(self) -> dict[str, Any]:
        """What `${law:STAGE.key}` gives: `ratio` (share of domain data), `replay` (1 - ratio), `low` and `high` (95 %
        interval of the ratio), `mixture` (share of every source), `tokens`, `n_params`, and `loss_<corpus>` predicted
        there [nats/token]; only `law` and `verdict` without a recommendation, or when it must not be used.
        """
        found: dict[str, Any] = {"law": self.law, "verdict": self.verdict}
        answer = self.recommendation
        if answer is None or self.unfit:
            return found
        shares = {corpus: _value(share) for corpus, share in (answer.get("mixture") or {}).items()}
        ratio = answer.get("ratio")
        if ratio is not None and _value(ratio) is not None:
            share = _value(ratio)
            found |= {"ratio": share, "replay": 1 - share, "low": ratio.get("low"), "high": ratio.get("high")}
            shares = shares or {DOMAIN: share, GENERAL: 1 - share}
        known = {corpus: share for corpus, share in shares.items() if share is not None}
        if known and len(known) == len(shares):
            found["mixture"] = self._sources(known)
        found |= {key: _value(answer.get(key)) for key in ("tokens", "n_params") if answer.get(key) is not None}
        losses = {f"loss_{corpus}": _value(loss) for corpus, loss in (answer.get("losses") or {}).items()}
        return found | {key: loss for key, loss in losses.items() if loss is not None}

    def save(self, path: str | Path) -> None:
        """Write `law.json`, whole or not at all."""
        write_json(path, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The file as plain values."""
        targets = {
            name: {
                "options": dataclasses.asdict(t.law),  # type: ignore[call-overload]
                "parameters": [p.name for p in t.law.parameters],
                "theta": t.theta_DP,
                "base": t.base,
                "objective": t.objective,
                "heldout": t.heldout,
                "in_sample": t.in_sample,
            }
            for name, t in self.targets.items()
        }
        table = {
            "name": self.table.name,
            "fingerprint": self.table.fingerprint,
            "columns": self.table.columns,
            "base": self.table.base,
            "records": self.table.records(base=False),
        }
        found: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "cpt": self.cpt,
            "law": self.law,
            "equation": self.equation,
            "verdict": self.verdict,
            "unfit": self.unfit,
            "corpora": self.table.corpora,
            "groups": self.groups,
            "settings": self.settings,
            "targets": targets,
            "table": table,
            "recommendation": self.recommendation,
            "no_recommendation": self.no_recommendation,
            "values": self.values(),
            "warnings": self.warnings,
        }
        return plain(found)

    @classmethod
    def load(cls, path: str | Path) -> SavedLaw:
        """Read `law.json`; a folder stands for the one in it.

        Raises:
            UsageError: no such file, not a law, of another version, or with other columns than its law has.
        """
        path = Path(path)
        try:
            path = path / "law.json" if path.is_dir() else path
            value = read_json(path)
        except FileNotFoundError:
            raise UsageError(f"there is no saved law `{path}`", "`cpt fit-law ... out=FOLDER` writes one") from None
        except PermissionError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"`{path}` {_unread(error)}", "fit it again from its table") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UsageError(f"`{path}` is not a saved law", "`cpt fit-law ... out=FOLDER` writes one")
        if value.get("version") != VERSION:
            raise UsageError(
                f"`{path}` is a saved law of version {value.get('version')} (cpt {value.get('cpt')}), "
                f"and cpt {__version__} reads version {VERSION}",
                "fit it again from its table",
            )
        try:
            found = cls._from(value, path)
            if plain(found.values()) != value["values"]:
                raise UsageError(f"`values` in `{path}` were changed after the law was fitted", "fit it again")
            return found
        except CptError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError, IndexError, ArithmeticError) as error:
            raise UsageError(f"`{path}` is damaged: {_damage(error)}", "fit it again from its table") from None

    @classmethod
    def _from(cls, value: Mapping[str, Any], path: Path) -> SavedLaw:
        settings = Settings(**value["settings"])
        held = value["table"]
        table = _table(held, path)
        if tuple(value["corpora"]) != table.corpora:
            raise UsageError(
                f"`{path}` is for the corpora {_named(value['corpora'])}, and its table has {_named(table.corpora)}"
            )
        targets = {}
        for name, one in value["targets"].items():
            law = _law(value["law"], one["options"])
            wanted = [p.name for p in law.parameters]
            if one["parameters"] != wanted:
                raise UsageError(
                    f"`{path}` holds {_named(one['parameters'])} for the law `{law.name}`, "
                    f"which has {_named(wanted)} in this version",
                    "fit it again from its table",
                )
            theta_DP = np.array(one["theta"], np.float64)
            if theta_DP.ndim != 2 or theta_DP.shape[1] != len(wanted) or not np.isfinite(theta_DP[:1]).all():
                raise UsageError(f"`{path}` holds no parameters of the law `{law.name}` for `{name}`")
            if name not in table.losses:
                raise UsageError(f"`{path}` has a law of `{name}`, and its table measures {_named(table.losses)}")
            targets[name] = SavedTarget(
                name=name,
                law=law,
                theta_DP=theta_DP,
                rows=table.rows(name).in_order(),
                base=_number(one["base"]),
                objective=float(one["objective"]),
                heldout=_number(one["heldout"]),
                in_sample=_number(one["in_sample"]),
            )
        if not targets:
            raise UsageError(f"`{path}` holds the law of no loss")
        return cls(
            law=value["law"],
            table=table,
            settings=settings,
            targets=targets,
            unfit=tuple(str(reason) for reason in value["unfit"]),
            recommendation=None if value["recommendation"] is None else dict(value["recommendation"]),
            no_recommendation=str(value["no_recommendation"]),
            groups={k: {source: float(part) for source, part in v.items()} for k, v in value["groups"].items()},
            warnings=tuple(dict(w) for w in value["warnings"]),
            cpt=str(value["cpt"]),
        )

    def _sources(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Shares of the sources that the corpora stand for."""
        found: dict[str, float] = {}
        for corpus, share in shares.items():
            inside = self.groups.get(corpus) or {corpus: 1.0}
            total = sum(inside.values())
            for source, part in inside.items():
                found[source] = found.get(source, 0.0) + share * part / total
        return found


def _law(name: str, options: Mapping[str, Any]) -> Law:
    kind = LAWS.get(name)
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if sorted(given) != sorted(known):
        raise UsageError(
            f"the saved law `{name}` has the options {_named(sorted(given))}, "
            f"and this version has {_named(sorted(known))}",
            "fit it again from its table",
        )
    return kind(**given)


def _table(held: Mapping[str, Any], path: Path) -> Table:
    records = held["records"]
    keys = dict.fromkeys(key for record in records for key in record)
    table = Table.of({key: [record.get(key) for record in records] for key in keys}, str(held["name"]))
    bases = tuple(
        Base(
            None if b["n_params"] is None else float(b["n_params"]), {str(k): float(v) for k, v in b["losses"].items()}
        )
        for b in held["base"]
    )
    table = dataclasses.replace(table, base=bases, columns=dict(held["columns"]), notes=(), warnings=())
    if table.fingerprint != held["fingerprint"]:
        raise UsageError(f"the measurements in `{path}` were changed after the law was fitted", "fit it again")
    return table


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _value(estimate: Any) -> Any:
    """The number of an estimate, which may be one itself."""
    return estimate.get("value") if isinstance(estimate, Mapping) else estimate


def _named(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(f"`{n}`" for n in names) or "none"


def _unread(error: Exception) -> str:
    """Why a file cannot be read as JSON, for a person."""
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "is empty"
        if error.pos >= len(error.doc.rstrip()) - len("fals") or error.msg.startswith("Unterminated string"):
            return "is cut off"
        return f"is not a saved law: line {error.lineno}, column {error.colno} is not JSON"
    if isinstance(error, UnicodeDecodeError):
        return "is not a saved law: it is not text"
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or 'unreadable'}"
    return "is not a saved law: it cannot be read as JSON"


def _damage(error: Exception) -> str:
    """What is wrong with the values of a saved law, for a person."""
    if isinstance(error, KeyError):
        return f"`{error.args[0] if error.args else '?'}` is missing"
    if named := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
        return f"nothing is known of `{named[1]}`"
    if named := re.search(r"missing .* arguments?: '(\w+)'", str(error)):
        return f"`{named[1]}` is missing"
    return "a value is not of the kind that belongs there"
