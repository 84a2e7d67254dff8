"""The table that a law is fitted to: one row for each measurement, checked; every fault is named with row and column.

    file ─▶ sheet (plain cells) ─▶ columns (which is what) ─▶ where ─▶ checks ─▶ Table ─▶ rows(target) for the fitter

Array suffix: none here; every array has one value per row of the table, in the order of the file.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cpt.base.errors import UsageError
from cpt.base.files import canonical_json, hash_text, without_nan
from cpt.laws import rows as law_rows
from cpt.laws import sheet as sheets
from cpt.laws.checks import Problems, numbers, refuse_unlike_sums, texts
from cpt.laws.columns import Meaning, meaning, meant
from cpt.laws.rows import Floats, Ints, Rows
from cpt.laws.sheet import Sheet
from cpt.laws.where import Where, number_of
from cpt.laws.where import parse as parse_where

DOMAIN, GENERAL, LONE = "domain", "general", "loss"
MOST_LOSS = 1e3  # [nats/token] no vocabulary gives more
FEWEST_TOKENS, FEWEST_PARAMS = 1e5, 1e4  # below, the unit is likely wrong
_UNIT_SLIP = "billions are written"
SAME_SIZE = 0.01  # sizes that differ by less, `85.1M` and 85,131,264, are of one base model [fraction]
SAME_BASE = 0.005  # measurements of one base model that differ by more are not of one model [fraction]


@dataclass(frozen=True)
class Base:
    """Losses of a model before the training that the law is about.

    Args:
        n_params: its size [parameters]; None when the table has no sizes.
        losses: by corpus [nats/token].
    """

    n_params: float | None
    losses: Mapping[str, float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Table:
    """Checked measurements.

    Args:
        name: of the file, for messages.
        run: label of the run that each row belongs to.
        n_params: parameters of the model [count].
        tokens: tokens seen at the measurement [tokens].
        step: optimizer steps at the measurement.
        weight: in the objective.
        lr: learning rate at the measurement.
        schedule: name of each row's lr schedule.
        eval_id, tokenizer: what each row was measured on and with.
        domain: label of each row's domain, in tables over several domains.
        k1, k2: how learnable that domain is (loss before training, rate of its fall in a probe).
        unique_tokens: distinct tokens by corpus [tokens].
        shares: by corpus [fraction]; `domain` and `general` for two; empty for none.
        losses: by corpus, `loss` when it has no name; NaN where a row does not measure it [nats/token].
        base: losses before training.
        line: of each row in its file.
        columns: quantity to name in the file.
        notes, warnings: what was done to the rows, and what looks wrong, one sentence each.
    """

    name: str
    run: tuple[str, ...]
    n_params: Floats | None
    tokens: Floats | None
    step: Floats | None
    weight: Floats
    lr: Floats | None
    schedule: tuple[str, ...] | None
    eval_id: tuple[str, ...] | None
    tokenizer: tuple[str, ...] | None
    domain: tuple[str, ...] | None
    k1: Floats | None
    k2: Floats | None
    unique_tokens: Mapping[str, Floats]
    shares: Mapping[str, Floats]
    losses: Mapping[str, Floats]
    base: tuple[Base, ...]
    line: Ints
    columns: Mapping[str, str]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.run)

    @classmethod
    def of(cls, columns: Mapping[str, Sequence[object]], name: str = "table") -> Table:
        """A table from columns in memory, with the checks of a file; None where a row has no value.

        What a program counted has its unit: small counts are not warned of.

        Raises:
            UsageError: what a file would be refused for.
        """
        plain = {key: [_plain(v) for v in values] for key, values in columns.items()}
        count = max((len(v) for v in plain.values()), default=0)
        if not count:
            raise UsageError(f"`{name}` has no rows", "a table has one row for each measurement")
        assert all(len(v) == count for v in plain.values()), "columns of different length"
        found = _build(Sheet(name, plain, range(1, count + 1)), None, {})
        return replace(found, warnings=tuple(w for w in found.warnings if _UNIT_SLIP not in w))

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of the shares."""
        return tuple(self.shares)

    @property
    def num_runs(self) -> int:
        """Distinct runs."""
        return len(set(self.run))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what was measured, whatever the order of rows, their lines and the names of columns."""
        measured = sorted(canonical_json(without_nan(record)) for record in self.records())
        return hash_text("\n".join(measured))

    def rows(self, target: str) -> Rows:
        """The rows that measure a loss, as a law wants them; the share is that of the measured corpus."""
        known = np.isfinite(self.losses[target])
        labels = sorted(set(self.run))
        number = {label: i for i, label in enumerate(labels)}
        domains = sorted(set(self.domain or ()))
        base = np.array([_nan(self.base_loss(target, n)) for n in self._sizes()])
        unique = self.unique_tokens.get(target)
        found = law_rows.rows(
            self.losses[target],
            n_params=self.n_params,
            tokens=self.tokens,
            share=self.shares.get(target),
            shares=np.stack(list(self.shares.values()), axis=1) if self.shares else None,
            corpora=self.corpora,
            run=[number[label] for label in self.run],
            weight=self.weight,
            unique_tokens=unique,
            base=base if np.isfinite(base).any() else None,
            domain=None if self.domain is None else [domains.index(d) for d in self.domain],
            k1=self.k1,
            k2=self.k2,
            line=self.line,
        )
        return found.take(known)

    def base_loss(self, target: str, n_params: float | None = None) -> float | None:
        """Loss of the base model of a size [nats/token]; None when it is not known.

        Args:
            n_params: with one base model in the table it need not be given.
        """
        known = [b for b in self.base if target in b.losses]
        if n_params is not None:
            far = {i: abs(b.n_params / n_params - 1) for i, b in enumerate(known) if b.n_params is not None}
            nearest = min(far, key=lambda i: far[i], default=None)
            if nearest is not None and far[nearest] <= SAME_SIZE:
                return known[nearest].losses[target]
            known = [b for b in known if b.n_params is None]
        return known[0].losses[target] if len(known) == 1 else None

    def with_base(self, losses: Mapping[str, float], n_params: float | None = None) -> Table:
        """The table with losses of the base model of a size, which go before those that it has of that size.

        Args:
            n_params: whose losses they are [parameters]; of no use when the table has no sizes.
        """
        if not losses:
            return self
        size = n_params if self.n_params is not None else None

        def same(other: float | None) -> bool:
            return other is None or size is None or abs(other / size - 1) <= SAME_SIZE

        kept = [
            Base(b.n_params, {k: v for k, v in b.losses.items() if k not in losses or not same(b.n_params)})
            for b in self.base
        ]
        return replace(self, base=(*(b for b in kept if b.losses), Base(size, dict(losses))))

    def records(self, base: bool = True) -> list[dict[str, Any]]:
        """All rows as plain values by quantity, with `base` the base models first as rows with 0 tokens."""
        found: list[dict[str, Any]] = []
        zero = "tokens" if self.tokens is not None or self.step is None else "step"
        for model in self.base if base else ():
            size = {} if model.n_params is None else {"n_params": model.n_params}
            found.append({"run": "base", **size, zero: 0.0} | {_loss_column(k): v for k, v in model.losses.items()})
        columns: dict[str, Any] = {"run": self.run}
        for key in ("n_params", "tokens", "step", "domain", "k1", "k2", "lr", "schedule", "eval_id", "tokenizer"):
            if getattr(self, key) is not None:
                columns[key] = getattr(self, key)
        two = set(self.shares) == {DOMAIN, GENERAL}
        columns |= {f"r_{k}" if two else f"w_{k}": v for k, v in self.shares.items()}
        columns |= {_unique_column(k): v for k, v in self.unique_tokens.items()}
        if np.any(self.weight != 1):
            columns["weight"] = self.weight
        columns |= {_loss_column(k): v for k, v in self.losses.items()}
        for i in range(len(self)):
            record = {key: _plain(values[i]) for key, values in columns.items()}
            found.append({k: v for k, v in record.items() if not (isinstance(v, float) and math.isnan(v))})
        return found

    def csv(self) -> str:
        """The table as CSV text that `read` reads back."""
        records = self.records()
        keys = list(dict.fromkeys(key for record in reversed(records) for key in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue()

    def _sizes(self) -> Iterable[float | None]:
        return [None] * len(self) if self.n_params is None else self.n_params.tolist()


def read(path: str | Path, where: str | None = None, columns: Mapping[str, str] | None = None) -> Table:
    """A table from a CSV, JSON lines or Parquet file.

    Args:
        where: which rows to use, such as `step >= 3000 and top5_loss == 0`.
        columns: quantity to column, where names say something else.

    Raises:
        UsageError: the file, its values or what was asked of them is wrong; names file, row and column.
    """
    chosen = parse_where(where) if where is not None else None
    return _build(sheets.read(path), chosen, columns or {})


def _build(sheet: Sheet, where: Where | None, given: Mapping[str, str]) -> Table:
    found = meaning(sheet.columns, given)
    if not any(key == LONE or key.startswith("loss_") for key in found.columns):
        raise UsageError(
            f"`{sheet.name}` has no column of losses: {_some(sheet.columns)}",
            *(f"did you mean `{key}` by `{name}`?" for name, key in meant(found.unused, found.columns).items()),
            "`columns={loss_domain: NAME, loss_general: NAME}` says which they are",
        )
    is_base = _base_rows(sheet, found)
    chosen = np.ones(len(sheet), bool)
    notes = list(found.notes)
    if where is not None:
        cells = {**{key: sheet.columns[name] for key, name in found.columns.items()}, **sheet.columns}
        exempt = {k: is_base for key in ("step", "tokens") if key in found.columns for k in (key, found.columns[key])}
        chosen = where.mask(cells, len(sheet), exempt)
        notes.append(f"`where` keeps {int(np.sum(chosen & ~is_base))} of {int(np.sum(~is_base))} rows")
    asked = {one.column for one in where.comparisons} if where is not None else set()
    if left := [name for name in found.unused if name not in asked]:
        near = "; ".join(f"did you mean `{key}` by `{name}`?" for name, key in meant(left, found.columns).items())
        notes.append(f"columns not used: {_some(left, 8)}" + (f"; {near}" if near else ""))
    used = [int(i) for i in np.flatnonzero(chosen & ~is_base)]
    if not used:
        why = f"no row meets `{where}`" if where is not None else "holds base losses only (0 tokens or steps)"
        raise UsageError(f"`{sheet.name}`: {why}" if where is not None else f"`{sheet.name}` {why}")
    problems, warnings = Problems(), list[str]()
    table = _checked(sheet, found, used, problems, warnings)
    base = _base(sheet, found, [int(i) for i in np.flatnonzero(chosen & is_base)], problems, warnings)
    problems.throw()
    table = _without_doubles(replace(table, base=base), sheet, used, notes)
    _refuse_nothing_to_fit(table)
    warnings += _unlike_runs(table)
    if LONE in table.losses and table.shares:
        notes.append(
            "`loss` does not say which corpus it is measured on, so it has no share of its own; "
            "`columns={loss_domain: NAME}` says so"
        )
    return replace(table, notes=tuple(notes), warnings=tuple(warnings))


def _base_rows(sheet: Sheet, found: Meaning) -> Any:
    """Rows of 0 tokens or 0 steps: the base model."""
    is_base = np.zeros(len(sheet), bool)
    for key in ("tokens", "step"):
        if key in found.columns:
            is_base |= np.array([number_of(v) == 0 for v in sheet.columns[found.columns[key]]], bool)
    return is_base


def _checked(sheet: Sheet, found: Meaning, used: list[int], problems: Problems, warnings: list[str]) -> Table:
    """The rows as arrays; what is wrong goes into `problems`."""
    columns = found.columns

    def column(key: str, **rules: Any) -> Floats | None:
        return numbers(sheet, columns[key], used, problems, **rules) if key in columns else None

    def words(key: str) -> tuple[str, ...] | None:
        return texts(sheet, columns[key], used) if key in columns else None

    n_params = column("n_params", above=0, what="a number of parameters")
    tokens = column("tokens", above=0, what="a number of tokens")
    for key, values, fewest, wanted in (
        ("n_params", n_params, FEWEST_PARAMS, "7B"),
        ("tokens", tokens, FEWEST_TOKENS, "10B"),
    ):
        if values is not None and (low := np.flatnonzero(values < fewest)).size:
            warnings.append(
                f"{sheet.place(used[low[0]], columns[key])} is {values[low[0]]:g}, below {fewest:,.0f}"
                + (f", as in {low.size - 1} more rows" if low.size > 1 else "")
                + f"; {_UNIT_SLIP} `{wanted}`"
            )
    losses = {
        _corpus(key): numbers(
            sheet, name, used, problems, above=0, most=MOST_LOSS, what="a loss", may_lack=True, plain=True
        )
        for key, name in columns.items()
        if key == LONE or key.startswith("loss_")
    }
    for i, row in enumerate(used):
        if all(math.isnan(values[i]) for values in losses.values()) and not problems.at(row):
            named = ", ".join(f"`{columns[_loss_column(k)]}`" for k in losses)
            problems.add(f"{sheet.place(row)} has no loss in {named}")
    unique = {
        _unique_corpus(key): numbers(sheet, name, used, problems, above=0, what="a number of tokens")
        for key, name in columns.items()
        if key.startswith("unique_")
    }
    weight = column("weight", least=0, what="a weight")
    run = words("run")
    shares = _shares(sheet, columns, used, problems, warnings)
    return Table(
        name=sheet.name,
        run=run if run is not None else _runs(n_params, shares, words("domain"), len(used)),
        n_params=n_params,
        tokens=tokens,
        step=column("step", least=0, what="a step"),
        weight=np.ones(len(used)) if weight is None else weight,
        lr=column("lr", least=0, what="a learning rate"),
        schedule=words("schedule"),
        eval_id=words("eval_id"),
        tokenizer=words("tokenizer"),
        domain=words("domain"),
        k1=column("k1", above=0, what="a loss"),
        k2=column("k2", what="a rate"),
        unique_tokens=unique,
        shares=shares,
        losses=losses,
        base=(),
        line=np.array([sheet.line[i] for i in used], np.int64),
        columns=dict(columns),
        notes=(),
        warnings=(),
    )


def _shares(
    sheet: Sheet, columns: Mapping[str, str], used: list[int], problems: Problems, warnings: list[str]
) -> dict[str, Floats]:
    keys = [k for k in columns if k.startswith("w_")] or [k for k in ("r_domain", "r_general") if k in columns]
    if not keys:
        return {}
    found = {k[2:]: numbers(sheet, columns[k], used, problems, least=0, what="a share") for k in keys}
    largest = max(float(np.nanmax(v, initial=0.0)) for v in found.values())
    if 1.5 < largest <= 100 and not problems:
        first = next(k for k in keys if np.nanmax(found[k[2:]], initial=0.0) == largest)
        problems.add(
            f"`{sheet.name}`, column `{columns[first]}` holds {largest:g}, and a share lies between 0 and 1",
            "if these are percent, divide by 100 or write them as `25%`",
        )
        return {}
    for key in keys:
        for i, value in enumerate(found[key[2:]]):
            if value > 1:
                problems.add(f"{sheet.place(used[i], columns[key])} is {value:g}, and a share lies between 0 and 1")
    if problems:
        return {}
    if keys in (["r_domain"], ["r_general"]):
        (corpus, values), other = next(iter(found.items())), {"domain": GENERAL, "general": DOMAIN}
        found = {corpus: values, other[corpus]: 1 - values}
    found = refuse_unlike_sums(found, sheet, [columns[k] for k in keys], used, problems, warnings)
    return {k: found[k] for k in (DOMAIN, GENERAL)} if set(found) == {DOMAIN, GENERAL} else found


def _base(sheet: Sheet, found: Meaning, used: list[int], problems: Problems, warnings: list[str]) -> tuple[Base, ...]:
    """Base models by size, from rows before any training; several measurements of one are averaged."""
    if not used:
        return ()
    columns = found.columns
    sizes: list[float | None] = [None] * len(used)
    if "n_params" in columns:
        known = numbers(
            sheet, columns["n_params"], used, problems, above=0, what="a number of parameters", may_lack=True
        )
        sizes = [None if math.isnan(n) else float(n) for n in known]
    measured: dict[float | None, dict[str, list[float]]] = {}
    for key, name in columns.items():
        if key == LONE or key.startswith("loss_"):
            values = numbers(
                sheet, name, used, problems, above=0, most=MOST_LOSS, what="a loss", may_lack=True, plain=True
            )
            for size, value in zip(sizes, values, strict=True):
                if not math.isnan(value):
                    measured.setdefault(size, {}).setdefault(_corpus(key), []).append(float(value))
    bases = []
    for size in sorted(measured, key=lambda n: (n is not None, n or 0.0)):
        losses = {}
        for corpus, found_losses in measured[size].items():
            losses[corpus] = math.fsum(found_losses) / len(found_losses)
            if max(found_losses) - min(found_losses) > SAME_BASE * losses[corpus]:
                of = "" if size is None else f" of {size:.4g} parameters"
                warnings.append(
                    f"rows before training{of} disagree on `{_loss_column(corpus)}`: {min(found_losses):.4f} to "
                    f"{max(found_losses):.4f}; their mean is used as the base loss"
                )
        bases.append(Base(size, losses))
    return tuple(bases)


def _runs(
    n_params: Floats | None, shares: Mapping[str, Floats], domain: tuple[str, ...] | None, count: int
) -> tuple[str, ...]:
    """Labels where there are none: rows of one domain, one size and one mixture are a run."""
    if n_params is None and not shares:
        return tuple(f"row {i + 1}" for i in range(count))
    parts = ([] if n_params is None else [n_params]) + list(shares.values())
    heads = [""] * count if domain is None else [f"{name} " for name in domain]
    return tuple(head + " ".join(f"{values[i]:.6g}" for values in parts) for i, head in enumerate(heads))


def _without_doubles(table: Table, sheet: Sheet, used: list[int], notes: list[str]) -> Table:
    """Each (run, step) once: equal measurements are merged, different ones refused."""
    moment = table.step if table.step is not None else table.tokens
    what = "step" if table.step is not None else "tokens"
    first: dict[tuple[Any, ...], int] = {}
    losses = {key: values.copy() for key, values in table.losses.items()}
    dropped = 0
    keep = np.ones(len(table), bool)
    for i in range(len(table)):
        key = (table.run[i], None if moment is None else float(moment[i]))
        other = first.setdefault(key, i)
        if other == i:
            continue
        for name, values in losses.items():
            if math.isnan(values[other]):
                values[other] = values[i]
            elif not math.isnan(values[i]) and values[i] != values[other]:
                at = "" if moment is None else f" at {what} {moment[i]:g}"
                hint = (
                    "runs that differ in more than size and mixture need a column `run`"
                    if "run" not in table.columns
                    else "a run is measured once at a step; other runs need other names in `run`"
                )
                raise UsageError(
                    f"{sheet.place(used[i], table.columns[_loss_column(name)])} is {values[i]:g}, and row "
                    f"{used[other] + 1} has {values[other]:g} for the same run{at}",
                    hint,
                )
        keep[i] = False
        dropped += 1
    if dropped:
        notes.append(
            f"{dropped} row{'s' if dropped > 1 else ''} repeated others and {'were' if dropped > 1 else 'was'} merged"
        )
    return _take(replace(table, losses=losses), keep) if dropped else table


def _take(table: Table, keep: Any) -> Table:
    """Some of the rows."""
    changed: dict[str, Any] = {}
    for key in ("n_params", "tokens", "step", "weight", "lr", "k1", "k2", "line"):
        if getattr(table, key) is not None:
            changed[key] = getattr(table, key)[keep]
    for key in ("run", "schedule", "eval_id", "tokenizer", "domain"):
        if getattr(table, key) is not None:
            changed[key] = tuple(v for v, kept in zip(getattr(table, key), keep, strict=True) if kept)
    for key in ("unique_tokens", "shares", "losses"):
        changed[key] = {k: v[keep] for k, v in getattr(table, key).items()}
    return replace(table, **changed)


def _refuse_nothing_to_fit(table: Table) -> None:
    if len(table) == 1:
        raise UsageError(
            f"`{table.name}` has a single row to fit",
            "a law needs rows of several ratios, sizes or lengths of training",
        )
    for corpus, values in table.losses.items():
        known = values[np.isfinite(values)]
        column = table.columns[_loss_column(corpus)]
        if len(known) < 2:
            raise UsageError(f"`{table.name}`: column `{column}` holds {len(known)} losses", "a law needs several rows")
        if np.all(known == known[0]):
            raise UsageError(
                f"`{table.name}`: column `{column}` is {known[0]:g} in all {len(known)} rows",
                "there is nothing that a law could explain",
            )


def _unlike_runs(table: Table) -> list[str]:
    """Runs whose rows differ in size or mixture."""
    seen: dict[str, tuple[float, ...]] = {}
    parts = ([] if table.n_params is None else [table.n_params]) + list(table.shares.values())
    for i, label in enumerate(table.run):
        values = tuple(float(v[i]) for v in parts)
        if seen.setdefault(label, values) != values:
            return [f"rows of run `{label}` differ in size or mixture; they are drawn together in the bootstrap"]
    return []


def _corpus(key: str) -> str:
    return LONE if key == LONE else key.removeprefix("loss_")


def _loss_column(corpus: str) -> str:
    return LONE if corpus == LONE else f"loss_{corpus}"


def _unique_corpus(key: str) -> str:
    return LONE if key == "unique_tokens" else key.removeprefix("unique_").removesuffix("_tokens")


def _unique_column(corpus: str) -> str:
    return "unique_tokens" if corpus == LONE else f"unique_{corpus}_tokens"


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _some(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    return ", ".join(f"`{n}`" for n in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
