"""Laws that predict a loss from size, tokens and mixture. New law = one file here + its import below."""

from __future__ import annotations

from cpt.laws import additive, chinchilla, cmr, cross_dcpt, dcpt, mixing, repeated, replay
from cpt.laws.law import LAWS, Law, Parameter

__all__ = [
    "LAWS",
    "Law",
    "Parameter",
    "additive",
    "chinchilla",
    "cmr",
    "cross_dcpt",
    "dcpt",
    "mixing",
    "repeated",
    "replay",
]
