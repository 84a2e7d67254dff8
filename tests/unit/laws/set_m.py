"""Made measurements of known D-CPT laws (specification, set M): what a fit must find again."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DOMAIN = {
    "E": 1.10,
    "A": 420,
    "alpha": 0.36,
    "B": 300,
    "beta": 0.34,
    "eta": 0.45,
    "C": 0.28,
    "eps": 0.08,
    "gamma": 0.55,
}
GENERAL = {
    "E": 1.75,
    "A": 510,
    "alpha": 0.35,
    "B": 250,
    "beta": 0.33,
    "eta": 0.30,
    "C": 0.12,
    "eps": 0.05,
    "gamma": 0.60,
}
RATIOS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SIZES = (5e8, 1.8e9, 4e9)
TOKENS = (2e9, 5e9, 1e10, 2e10)
HEAD = "run,n_params,tokens,r_domain,loss_domain,loss_general"


def loss(law: dict[str, float], n_params: float, tokens: float, share: float) -> float:
    """The D-CPT law [nats/token]."""
    third = 0.0 if share == 0 else law["B"] * share ** law["eta"] / tokens ** law["beta"]
    last = law["C"] / (share + law["eps"]) ** law["gamma"]
    return float(law["E"] + law["A"] / n_params ** law["alpha"] + third + last)


def lines(noise: float = 0.002, seed: int = 3) -> list[str]:
    """Rows of a table with noise of so much [fraction]."""
    rng = np.random.default_rng(seed)
    found = []
    for n in SIZES:
        for r in RATIOS:
            for d in TOKENS:
                domain, general = loss(DOMAIN, n, d, r), loss(GENERAL, n, d, 1 - r)
                domain, general = (x * float(np.exp(noise * rng.standard_normal())) for x in (domain, general))
                found.append(f"{n / 1e9:g}B-{r:g},{n:g},{d:g},{r:g},{domain:.6f},{general:.6f}")
    return found


def write(path: Path, rows: list[str] | None = None, head: str = HEAD) -> Path:
    """A CSV file of the rows."""
    path.write_text("\n".join([head, *(lines() if rows is None else rows)]) + "\n")
    return path
