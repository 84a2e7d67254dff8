"""Measurements of one loss as arrays, in an order that does not depend on the file's.

Array suffixes: R rows, K corpora.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Rows:
    """One loss measured in many runs; also the points at which a law is asked (then `loss_R` is NaN).

    Args:
        loss_R: validation loss [nats/token].
        n_params_R: parameters of the model [count].
        tokens_R: tokens of training seen at the measurement [tokens].
        share_R: share of the corpus that the loss is measured on [fraction].
        shares_RK: shares of all corpora, each row summing to 1 [fraction].
        corpora: names of the K columns.
        run_R: number of the run that a row belongs to; checkpoints of one run share it.
        weight_R: weight in the objective.
        unique_tokens_R: distinct tokens of the measured corpus [tokens].
        base_R: the loss before training, of the model of each row [nats/token].
        domain_R: number of the domain, for laws over several domains.
        k1_R, k2_R: how learnable the row's domain is: loss before training, and its rate of fall in a probe.
        line_R: where the row stands in its file, for messages.
    """

    loss_R: Floats
    n_params_R: Floats | None = None
    tokens_R: Floats | None = None
    share_R: Floats | None = None
    shares_RK: Floats | None = None
    corpora: tuple[str, ...] = ()
    run_R: Ints
    weight_R: Floats
    unique_tokens_R: Floats | None = None
    base_R: Floats | None = None
    domain_R: Ints | None = None
    k1_R: Floats | None = None
    k2_R: Floats | None = None
    line_R: Ints

    def __len__(self) -> int:
        return len(self.loss_R)

    @property
    def num_runs(self) -> int:
        """Distinct runs."""
        return len(np.unique(self.run_R))

    def take(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> Rows:
        """Some of the rows, by mask or index; runs keep their numbers."""
        found: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            found[f.name] = value[which] if isinstance(value, np.ndarray) else value
        return Rows(**found)

    def in_order(self) -> Rows:
        """The same rows sorted by what they hold, so that the order in the file changes nothing."""
        keys: list[Any] = [self.loss_R, self.weight_R]
        for column in (self.unique_tokens_R, self.tokens_R, self.share_R, self.n_params_R, self.domain_R):
            if column is not None:
                keys.append(column)
        if self.shares_RK is not None:
            keys += list(self.shares_RK.T)
        return self.take(np.lexsort(keys))


def rows(loss: Floats | list[float], **columns: object) -> Rows:
    """Rows from arrays or lists in the file's order, each column by its name without suffix (`share=...`).

    Without `run` each row is a run of its own; without `weight` all weigh 1.
    """
    loss_R = np.asarray(loss, np.float64)
    found: dict[str, object] = {"loss_R": loss_R}
    whole = {"run", "domain", "line"}
    for name, value in columns.items():
        if name == "corpora":
            found[name] = tuple(value)  # type: ignore[arg-type]
        elif value is not None:
            kind = np.int64 if name in whole else np.float64
            found[name + ("_RK" if name == "shares" else "_R")] = np.asarray(value, kind)
    found.setdefault("run_R", np.arange(len(loss_R)))
    found.setdefault("weight_R", np.ones(len(loss_R)))
    found.setdefault("line_R", np.arange(1, len(loss_R) + 1))
    return Rows(**found)  # type: ignore[arg-type]


def points(
    *,
    n_params: float | Floats | None = None,
    tokens: float | Floats | None = None,
    share: float | Floats | None = None,
    shares: Floats | None = None,
    corpora: tuple[str, ...] = (),
    unique_tokens: float | Floats | None = None,
    base: float | Floats | None = None,
    k1: float | Floats | None = None,
    k2: float | Floats | None = None,
) -> Rows:
    """Points at which a law is asked; scalars are repeated to the longest column."""
    given = {"n_params": n_params, "tokens": tokens, "share": share, "unique_tokens": unique_tokens}
    given |= {"base": base, "k1": k1, "k2": k2}
    sizes = [np.size(v) for v in given.values() if v is not None] + ([len(shares)] if shares is not None else [])
    count = max(sizes, default=1)
    columns: dict[str, object] = {
        k: np.broadcast_to(np.asarray(v, np.float64), (count,)) for k, v in given.items() if v is not None
    }
    return rows(np.full(count, np.nan), **columns, shares=shares, corpora=corpora)
