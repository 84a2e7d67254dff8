"""Made tables for tests: the worked D-CPT law of the specification, with and without noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpt.laws.dcpt import DCPT
from cpt.laws.rows import Floats, points
from cpt.laws.table import Table
from tests.unit.laws.set_m import DOMAIN, GENERAL

BASE_GENERAL = 2.296
RATIOS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
SIZES = (5e8, 1.8e9, 4e9)
TOKENS = tuple(float(d) for d in np.geomspace(1e9, 2e10, 6))


def loss_of(values: dict[str, float], n_params: Floats | float, tokens: Floats | float, share: Floats) -> Floats:
    """The law's losses [nats/token]."""
    law = DCPT()
    return law.loss(law.fitted(values)[None], points(n_params=n_params, tokens=tokens, share=share))[0][0]


def columns(
    ratios: Sequence[float] = RATIOS,
    sizes: Sequence[float] = SIZES,
    tokens: Sequence[float] = TOKENS,
    noise: float = 0.002,
    seed: int = 0,
) -> dict[str, list[object]]:
    """Columns of a table of set M."""
    rng = np.random.default_rng(seed)
    grid = np.array([(r, n, d) for n in sizes for r in ratios for d in tokens])
    share, n_params, tokens_R = grid.T
    z = rng.standard_normal((2, len(grid)))
    return {
        "n_params": n_params.tolist(),
        "tokens": tokens_R.tolist(),
        "r_domain": share.tolist(),
        "loss_domain": (loss_of(DOMAIN, n_params, tokens_R, share) * np.exp(noise * z[0])).tolist(),
        "loss_general": (loss_of(GENERAL, n_params, tokens_R, 1 - share) * np.exp(noise * z[1])).tolist(),
    }


def set_m(**options: object) -> Table:
    """The table."""
    return Table.of(columns(**options), name="set M")  # type: ignore[arg-type]


def reordered(given: dict[str, list[object]], seed: int = 3) -> dict[str, list[object]]:
    """The same rows in another order."""
    order = np.random.default_rng(seed).permutation(len(next(iter(given.values()))))
    return {name: [values[i] for i in order] for name, values in given.items()}
