"""The loss matrix of a run and what follows from it: transfer, forgetting, learned and retained loss.

`R[k][j]` is the score on domain j after stage k; row 0 is the untouched start. A loss L is turned into the score -L
once, in `Matrix.of_losses`; every measure below reads scores, where more is better. All averages are over domains
(macro), never over tokens.

Source:
    TRACE (Wang et al. 2023, arXiv:2310.06762) for backward transfer and overall performance; Lopez-Paz and Ranzato
    2017, arXiv:1706.08840, for the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cpt.base.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A mean with its denominator; `value` is None when there is nothing to average over."""

    value: float | None
    over: int


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Scores by stage and domain.

    Args:
        stages: names of stages 1 to K.
        domains: names of the columns.
        scores: K + 1 rows; row 0 is the untouched start. More is better.
        learned: by domain, the stage (1 to K) that first trained on it; 0 for what only the start model knew.
    """

    stages: tuple[str, ...]
    domains: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    learned: Mapping[str, int]

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.stages) + 1:
            raise UsageError(
                f"the loss matrix has {len(self.scores)} rows for {len(self.stages)} stages; wanted one more, "
                "because row 0 is the untouched start",
                "measure before the first step: `evaluate.at_start: true`",
            )
        if any(len(row) != len(self.domains) for row in self.scores):
            raise UsageError("the loss matrix has rows of different length")
        for domain in self.domains:
            if not 0 <= self.learned.get(domain, -1) <= len(self.stages):
                raise UsageError(f"no stage is known that source `{domain}` was learned in")

    @classmethod
    def of_losses(
        cls,
        stages: Sequence[str],
        domains: Sequence[str],
        losses: Sequence[Sequence[float]],
        learned: Mapping[str, int],
    ) -> Matrix:
        """A matrix from losses [nats/token]: the one place where the sign is turned."""
        scores = tuple(tuple(-loss for loss in row) for row in losses)
        return cls(stages=tuple(stages), domains=tuple(domains), scores=scores, learned=dict(learned))

    @property
    def last(self) -> int:
        """K, the number of stages."""
        return len(self.stages)

    def column(self, domain: str) -> tuple[float, ...]:
        """Scores of one domain after stages 0 to K."""
        j = self.domains.index(domain)
        return tuple(row[j] for row in self.scores)

    def average_after(self, stage: int) -> Measure:
        """Mean score after a stage over what had been learned by then: mean over j <= k of R[k][j]."""
        return mean([self.column(d)[stage] for d in self.domains if self.learned[d] <= stage])

    def overall(self) -> Measure:
        """Mean score after the last stage over all domains (TRACE's OP)."""
        return mean([self.column(d)[-1] for d in self.domains])

    def backward_transfer(self) -> Measure:
        """Mean over domains learned in stages 1 to K - 1 of R[K][j] - R[j][j]; below 0 means forgotten."""
        earlier = [d for d in self.domains if 1 <= self.learned[d] < self.last]
        return mean([self.column(d)[-1] - self.column(d)[self.learned[d]] for d in earlier])

    def forward_transfer(self) -> Measure:
        """Mean over domains learned in stages 2 to K of R[j-1][j] - R[0][j]: what earlier stages gave them."""
        later = [d for d in self.domains if self.learned[d] >= 2]
        return mean([self.column(d)[self.learned[d] - 1] - self.column(d)[0] for d in later])

    def forgetting_of(self, domain: str) -> float:
        """Best earlier score minus the last: max over i < K of R[i][j], minus R[K][j]; below 0 = gained."""
        column = self.column(domain)
        return max(column[:-1]) - column[-1] if len(column) > 1 else 0.0

    def forgetting(self) -> Measure:
        """Mean of `forgetting_of` over all domains."""
        return mean([self.forgetting_of(d) for d in self.domains] if self.last else [])

    def forgetting_of_older(self) -> Measure:
        """Mean of `forgetting_of` over the domains known before the newest ones were learned: no gain hides a loss."""
        latest = max(self.learned[d] for d in self.domains) if self.domains else 0
        older = [d for d in self.domains if self.learned[d] < latest]
        return mean([self.forgetting_of(d) for d in older] if self.last else [])

    def learned_loss(self) -> Measure:
        """Mean loss of each domain right after the stage that learned it: mean of L[j][j] [nats/token]."""
        return mean([-self.column(d)[self.learned[d]] for d in self.domains if self.learned[d] >= 1])

    def retained_loss(self) -> Measure:
        """Mean loss of the same domains at the end: mean of L[K][j] [nats/token]."""
        return mean([-self.column(d)[-1] for d in self.domains if self.learned[d] >= 1])

    def fuar(self) -> float | None:
        """Forgotten per gained: the newest domains against all those known before them (see `fuar`).

        None when nothing was gained, or there is nothing to forget.
        """
        latest = max(self.learned[d] for d in self.domains) if self.domains else 0
        old = [d for d in self.domains if self.learned[d] < latest]
        new = [d for d in self.domains if self.learned[d] == latest]
        if not old or latest == 0:
            return None
        forgotten = []
        for i in range(self.last):
            known = [d for d in old if self.learned[d] <= i]
            if known:
                at = [mean([self.column(d)[k] for d in known]).value for k in (i, self.last)]
                forgotten.append((at[0] or 0.0, at[1] or 0.0))
        acquired = [mean([self.column(d)[k] for d in new]).value or 0.0 for k in range(self.last + 1)]
        return fuar(forgotten, (), acquired)


def mean(values: Sequence[float]) -> Measure:
    """The mean with its denominator."""
    return Measure(value=sum(values) / len(values) if values else None, over=len(values))


def fuar(retained: Sequence[tuple[float, float]], updated: Sequence[float], acquired: Sequence[float]) -> float | None:
    """Forgotten / (updated + acquired) ratio: 1.0 means one item forgotten for each item gained; lower is better.

    FUAR = sum over i < n of max(0, Gap(F_i, i, n)) / sum over i < n of [max(0, Gap(U, n, i)) + max(0, Gap(A, n, i))],
    where Gap(T, a, b) is the score on T of model a minus that of model b.

    Args:
        retained: for each model i < n, the scores on F_i (what is to be kept) of model i and of the last model n.
        updated: scores on U of models 0 to n; empty when nothing is to be updated.
        acquired: scores on A of models 0 to n; empty when nothing is new.

    Returns:
        The ratio, or None when nothing was gained.

    Source:
        Jang et al. 2022, "Towards Continual Knowledge Learning of Language Models", arXiv:2110.03215.
    """
    lost = sum(max(0.0, before - after) for before, after in retained)
    won = sum(max(0.0, scores[-1] - s) for scores in (updated, acquired) for s in scores[:-1])
    return lost / won if won > 0 else None


def retained_share(before: float, after: float, uniform: float) -> float | None:
    """What is left of what the model knew of a domain: (L_uniform - L_after) / (L_uniform - L_before).

    Args:
        before: loss before [nats/token].
        after: loss after [nats/token].
        uniform: loss of a uniform guess, ln of the vocabulary size [nats/token].

    Returns:
        1.0 = all of it, above 1 = more than before; None when the model knew nothing before.
    """
    known = uniform - before
    return (uniform - after) / known if known > 0 else None
