"""The worked examples: set M (monotone losses) and set T (a trap: both losses turn), as losses that can be asked."""

from __future__ import annotations

import numpy as np

from cpt.laws.dcpt import DCPT
from cpt.laws.recommend.answer import Loss
from cpt.laws.rows import Floats, points
from tests.unit.laws.set_m import DOMAIN, GENERAL

N, D = 1.8e9, 1e10
LAW = DCPT()
BASE = {"M": 2.296, "T": 2.503}


def theta(name: str, draws: int = 1, noise: float = 0.01) -> tuple[Floats, Floats]:
    """Parameters of the domain and the general law: the set itself, then draws round it."""
    domain, general = (DOMAIN, GENERAL) if name == "M" else (DOMAIN | {"B": 900}, GENERAL | {"B": 700})
    rng = np.random.default_rng(5)
    found = []
    for values in (domain, general):
        theta_P = LAW.fitted(values)
        near_DP = theta_P + noise * rng.standard_normal((draws - 1, len(theta_P)))
        found.append(np.concatenate([theta_P[None], near_DP]))
    return found[0], found[1]


def loss(theta_DP: Floats, n_params: float = N) -> Loss:
    """The loss of these draws by (share, tokens)."""

    def ask(share_G: Floats, tokens_G: Floats) -> Floats:
        return LAW.loss(theta_DP, points(n_params=n_params, tokens=tokens_G, share=share_G))[0]

    return ask


def both(name: str, draws: int = 1) -> tuple[Loss, Loss]:
    """Domain and general loss of a set."""
    domain_DP, general_DP = theta(name, draws)
    return loss(domain_DP), loss(general_DP)
