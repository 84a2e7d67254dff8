"""Published tables as plain columns, and the check that a law's derivatives are those of its formula."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from cpt.laws.law import Law
from cpt.laws.rows import Floats, Rows
from tests.shared import shared_data


def columns(name: str) -> dict[str, np.ndarray]:
    """A shared table by column: numbers where all cells are numbers, else text; skips when it is not there."""
    with open(shared_data("laws", name), newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for key in rows[0]:
        cells = [row[key] for row in rows]
        try:
            found[key] = np.array([float(cell) for cell in cells])
        except ValueError:
            found[key] = np.array(cells)
    return found


def shares(table: dict[str, np.ndarray], which: slice | np.ndarray = slice(None)) -> tuple[np.ndarray, tuple[str, ...]]:
    """Shares of all corpora, each row summing to 1, and the corpora's names."""
    names = tuple(name for name in table if name.startswith("w_"))
    share_RK = np.stack([table[name][which] for name in names], 1)
    return share_RK / share_RK.sum(1, keepdims=True), tuple(name[2:] for name in names)


def assert_slopes(law: Law, theta_P: Floats, at: Rows, rel: float = 1e-5) -> None:
    """Every derivative equals the central difference of the formula."""
    _, slope_BRP = law.loss(theta_P[None], at)
    assert slope_BRP.shape == (1, len(at), len(theta_P))
    for p, parameter in enumerate(law.parameters):
        step = np.zeros_like(theta_P)
        step[p] = 1e-5
        high, low = law.loss((theta_P + step)[None], at)[0][0], law.loss((theta_P - step)[None], at)[0][0]
        wanted = (high - low) / 2e-5
        scale = max(1.0, float(np.abs(wanted).max()))
        assert slope_BRP[0, :, p] == pytest.approx(wanted, rel=rel, abs=rel * scale), parameter.name
