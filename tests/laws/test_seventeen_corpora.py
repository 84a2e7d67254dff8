"""R1 and R2: laws of 17 corpora, fitted on 512 small runs, rank 256 mixtures that they have not seen, for 13 losses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from cpt.laws.additive import Additive
from cpt.laws.fit import fit
from cpt.laws.law import Law
from cpt.laws.mixing import Mixing
from cpt.laws.rows import points, rows
from tests.unit.laws.published import columns, shares


@pytest.mark.parametrize(
    ("kind", "pile_cc", "mean"),
    [(Mixing, 0.960, 0.970), (Additive, 0.993, 0.991)],  # published trees, stopped on the test set: 0.9892 and 0.9895
    ids=["mixing", "additive"],
)
def test_unseen_mixtures_of_17_corpora_are_ranked(kind: type[Law], pile_cc: float, mean: float) -> None:
    train, test = columns("regmix_1m_train.csv"), columns("regmix_1m_test.csv")
    (train_RK, names), (test_RK, _) = shares(train), shares(test)
    ranks = {}
    for target in [name for name in train if name.startswith("loss_")]:
        found = rows(train[target], shares=train_RK, corpora=names)
        law, _ = kind.for_rows(found)
        ranks[target] = spearmanr(fit(law, found).predict(points(shares=test_RK)), test[target])[0]
    assert len(ranks) == 13
    assert ranks["loss_pile_cc"] >= pile_cc
    assert np.mean(list(ranks.values())) >= mean
