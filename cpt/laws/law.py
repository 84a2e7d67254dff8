"""What a law is: a formula for a loss with its gradient, bounds and starts. New law = one file + its import.

A law works in fitting space: a positive parameter is fitted as its logarithm, so that steps are relative and signs
hold. The frozen fields of a law say which terms it has; `for_rows` leaves out those that a table cannot determine.

Array suffixes: B several parameter vectors at once (starts, resamples), P parameters, R rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cpt.base.registry import Registry
from cpt.laws.rows import Floats, Rows


@dataclass(frozen=True)
class Parameter:
    """One fitted number.

    Args:
        name: as in the law's formula.
        low, high: bounds in fitting space.
        log: fitted as its logarithm.
    """

    name: str
    low: float
    high: float
    log: bool = True


class Law(ABC):
    """A formula for one loss. Subclasses are frozen dataclasses; their fields are the law's options."""

    name: ClassVar[str]
    equation: ClassVar[str]  # in plain text
    settable: ClassVar[Mapping[str, Callable[[object], object]]] = {}  # options that a person may set, how to read them
    needs: ClassVar[tuple[str, ...]] = ()  # columns: n_params, tokens, share, shares, unique_tokens, base, k1, k2

    @property
    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The fitted numbers, in the order of a parameter vector."""

    @abstractmethod
    def loss(self, theta_BP: Floats, rows: Rows) -> tuple[Floats, Floats]:
        """Predicted losses and their derivatives by the parameters in fitting space.

        Returns:
            loss_BR [nats/token], gradient_BRP.
        """

    @abstractmethod
    def starts(self, rows: Rows, rng: np.random.Generator, count: int) -> Floats:
        """So many parameter vectors to start from, best guesses first.

        Returns:
            theta_SP in fitting space.
        """

    @classmethod
    def for_rows(cls, rows: Rows, **options: object) -> tuple[Law, tuple[str, ...]]:
        """The law with the terms that the rows can determine, and what was left out and why, one sentence each.

        Raises:
            UsageError: the rows cannot determine the law at all; says what is missing.
        """
        return cls(**options), ()

    def left_with(self, rows: Rows) -> Law:
        """The law for fewer rows than it was made for: another one where its terms belong to what rows hold.

        Raises:
            UsageError: these rows cannot determine it.
        """
        return self

    def natural(self, theta_P: Floats) -> dict[str, float]:
        """Parameters as people write them, by name."""
        pairs = zip(self.parameters, theta_P, strict=True)
        return {p.name: float(np.exp(t)) if p.log else float(t) for p, t in pairs}

    def fitted(self, values: Mapping[str, float]) -> Floats:
        """A parameter vector in fitting space from `natural` values."""
        return np.array([np.log(values[p.name]) if p.log else values[p.name] for p in self.parameters])

    @property
    def bounds(self) -> tuple[Floats, Floats]:
        """low_P, high_P in fitting space."""
        return np.array([p.low for p in self.parameters]), np.array([p.high for p in self.parameters])


LAWS: Registry[type[Law]] = Registry("law")
