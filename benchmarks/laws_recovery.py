"""Recovery of a known law from noisy runs, and how often the interval of the recommended ratio holds the true one.

    python -m benchmarks.laws_recovery [--draws 100] [--resamples 200] [--json]

Each draw: 9 ratios x 3 sizes x 20 token counts of the D-CPT law of `tests/unit/laws/set_m.py` (set M), every loss
times exp(noise of 0.5 %). What a person would run is run: `analyse` with both losses, resamples by run, and usage 1
with a tolerance of 3 % for 1.8B parameters and 10B tokens, where the true answer is a domain share of 0.726071.

The goal of 90 intervals in 100 that hold the truth is judged as such from 100 draws on. Of fewer draws chance alone
may take more than a tenth: as many may miss as a miss rate of 10 % gives in 19 of 20 cases (3 of 10).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpt.laws.analyse import analyse
from cpt.laws.dcpt import DCPT
from cpt.laws.rows import points
from cpt.laws.settings import Settings
from cpt.laws.table import Table
from tests.unit.laws.set_m import DOMAIN, GENERAL

BASE_GENERAL, TOLERANCE, N_PARAMS, TOKENS, TRUTH = 2.296, 0.03, 1.8e9, 1e10, 0.726071
RATIOS = (0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1)
SIZES = (0.5e9, 1.8e9, 4e9)
COUNTS = tuple(1.3e9 * k for k in range(1, 21))
NOISE = 0.005


def true_losses(domain_share_R: Any, n_params_R: Any, tokens_R: Any) -> tuple[Any, Any]:
    """Domain and general loss without noise [nats/token]."""
    law = DCPT()
    found = []
    for values, share_R in ((DOMAIN, domain_share_R), (GENERAL, 1 - domain_share_R)):
        asked = points(n_params=n_params_R, tokens=tokens_R, share=share_R)
        found.append(law.loss(law.fitted(values)[None], asked)[0][0])
    return found[0], found[1]


def one(draw: int, resamples: int) -> dict[str, Any]:
    """One noisy table, fitted and asked."""
    rng = np.random.default_rng([2024, draw])
    grid = np.array([(r, n, d) for r in RATIOS for n in SIZES for d in COUNTS])
    share_R, n_params_R, tokens_R = grid.T
    domain_R, general_R = true_losses(share_R, n_params_R, tokens_R)
    noise = np.exp(NOISE * rng.standard_normal((2, len(grid))))
    table = Table.of(
        {
            "n_params": n_params_R,
            "tokens": tokens_R,
            "r_domain": share_R,
            "loss_domain": domain_R * noise[0],
            "loss_general": general_R * noise[1],
        },
        name=f"draw {draw}",
    )
    settings = Settings(
        tolerance=TOLERANCE,
        base_losses={"general": BASE_GENERAL},
        n_params=N_PARAMS,
        tokens=TOKENS,
        bootstrap=resamples,
        seed=draw,
        compare=False,
    )
    start = time.perf_counter()
    found = analyse(table, "dcpt", settings)
    seconds = time.perf_counter() - start
    misses = []
    for name, true_R, asked_R in (("domain", domain_R, share_R), ("general", general_R, 1 - share_R)):
        asked = points(n_params=n_params_R, tokens=tokens_R, share=asked_R)
        misses.append(np.abs(found.fits[name].fit.predict(asked) / true_R - 1))
    assert found.recommendation is not None and found.recommendation.ratio is not None
    ratio = found.recommendation.ratio
    return {
        "draw": draw,
        "mean_error": float(np.mean(misses)),
        "largest_error": float(np.max(misses)),
        "ratio": ratio.value,
        "low": ratio.low,
        "high": ratio.high,
        "covers": ratio.low <= TRUTH <= ratio.high,
        "verdict": found.verdict,
        "seconds": seconds,
    }


def allowed_misses(draws: int) -> int:
    """How many intervals may miss the truth."""
    if draws >= 100:
        return draws // 10
    total, misses = 0.0, -1
    while total < 0.95:
        misses += 1
        total += math.comb(draws, misses) * 0.1**misses * 0.9 ** (draws - misses)
    return misses


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laws_recovery")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    found = []
    for draw in range(chosen.draws):
        found.append(one(draw, chosen.resamples))
        if sys.stderr.isatty():
            sys.stderr.write(f"\rdraw {draw + 1} of {chosen.draws}")
    covered = sum(f["covers"] for f in found)
    missed, allowed = chosen.draws - covered, allowed_misses(chosen.draws)
    apart = [abs(f["ratio"] - TRUTH) for f in found]
    figures = [
        ("mean error, median draw", statistics.median(f["mean_error"] for f in found), 0.001, "{:.3%}"),
        ("largest error, median draw", statistics.median(f["largest_error"] for f in found), 0.006, "{:.3%}"),
        ("largest error, any draw", max(f["largest_error"] for f in found), 0.01, "{:.3%}"),
        ("ratio off the truth, median draw", statistics.median(apart), 0.02, "{:.4f}"),
        ("intervals that miss the truth", missed, allowed, "{:.0f}"),
    ]
    met = all(value <= target for _, value, target, _ in figures)
    if chosen.json:
        print(json.dumps({"draws": found, "covered": covered, "met": met}, indent=1))
        return 0 if met else 1
    for name, value, target, form in figures:
        verdict = "met" if value <= target else "MISSED"
        print(f"{name:<34} {form.format(value):>8}   target ≤ {form.format(target):>7}   {verdict}")
    seconds = [f["seconds"] for f in found]
    print(f"covered                            {covered} of {chosen.draws}; ratio {_span([f['ratio'] for f in found])}")
    print(f"largest distance of the ratio      {max(apart):.4f}")
    print(f"time                               {statistics.median(seconds):.1f} s a draw ({len(seconds)} draws)")
    return 0 if met else 1


def _span(values: list[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}"


if __name__ == "__main__":
    sys.exit(main())
