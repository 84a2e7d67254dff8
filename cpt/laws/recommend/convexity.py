"""Which fitted laws are convex in the shares, so that the best mixture over several corpora can be proven best.

    mixing     c + exp(linear in h): convex, whatever was fitted.
    additive   1 / sum_i C_i h_i^gamma_i: one over a concave, positive sum when every gamma_i <= 1; terms in N and D do
               not depend on h, but in the joint form are (linear in h)^g, convex when g >= 1.

The additive law reads small shares as 1e-4; that is convex only above it, so no share below is proposed.
"""

from __future__ import annotations

from cpt.laws.additive import FLOOR, Additive
from cpt.laws.law import Law
from cpt.laws.mixing import Mixing
from cpt.laws.rows import Floats


def why_not_convex(law: Law, theta_P: Floats) -> str:
    """Why the fitted law is not known to be convex in the shares; empty when it is."""
    if isinstance(law, Mixing):
        return ""
    if not isinstance(law, Additive):
        return f"nothing is known of the law `{law.name}`"
    values = law.natural(theta_P)
    steep = [corpus for corpus in law.corpora if values[f"gamma_{corpus}"] > 1]
    if steep:
        return "gamma is above 1 for " + " and ".join(f"`{corpus}`" for corpus in steep)
    low = [name for name in ("gA", "gB") if values.get(name, 1.0) < 1]
    return f"{' and '.join(low)} below 1" if low else ""


def smallest_share(law: Law) -> float:
    """The least share that the law tells from none [fraction]."""
    return FLOOR if isinstance(law, Additive) else 0.0
