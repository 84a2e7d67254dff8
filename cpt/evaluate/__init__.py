"""What a model learned and forgot: losses by stage and domain, transfer, forgetting, stability gaps."""

from cpt.evaluate.collect import Account, Change, Loss, Measurement, Row, account, measurements
from cpt.evaluate.gap import Gap, find_gap
from cpt.evaluate.matrix import Matrix, Measure, fuar, retained_share

__all__ = [
    "Account",
    "Change",
    "Gap",
    "Loss",
    "Matrix",
    "Measure",
    "Measurement",
    "Row",
    "account",
    "find_gap",
    "fuar",
    "measurements",
    "retained_share",
]
