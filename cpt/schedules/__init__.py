"""Learning-rate curves as pure functions of the step. New curve = one file and its import here."""

from cpt.schedules import constant, cosine, infinite, inverse_sqrt, linear, rewarm, wsd
from cpt.schedules.join import StageLr, curve, pre_anneal_step, resolve
from cpt.schedules.schedule import SCHEDULES, Schedule, make

__all__ = [
    "SCHEDULES",
    "Schedule",
    "StageLr",
    "constant",
    "cosine",
    "curve",
    "infinite",
    "inverse_sqrt",
    "linear",
    "make",
    "pre_anneal_step",
    "resolve",
    "rewarm",
    "wsd",
]
