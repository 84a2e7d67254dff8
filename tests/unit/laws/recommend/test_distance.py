"""Where a question lies: inside the hull of the measured points, in a corner without runs, or beyond a range."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.laws.recommend.distance import distance
from cpt.laws.rows import Rows, rows


def grid() -> Rows:
    """Sizes 1e8 and 1e9, tokens 1e9 and 1e10, ratios 0.25 to 1."""
    mesh = np.meshgrid([1e8, 1e9], [1e9, 1e10], [0.25, 0.5, 1.0], indexing="ij")
    n_params, tokens, share = (m.ravel() for m in mesh)
    return rows(np.ones(12), n_params=n_params, tokens=tokens, share=share)


def test_inside_all_factors_are_1() -> None:
    found = distance(grid(), n_params=3e8, tokens=2e9, share=0.9)
    assert found.inside and found.factors == {"n_params": 1.0, "tokens": 1.0, "ratio": 1.0}
    assert found.reason == "inside the measured points" and found.strong == ()


def test_corners_and_faces_belong_to_the_inside() -> None:
    assert distance(grid(), n_params=1e8, tokens=1e10, share=1.0).inside
    assert distance(grid(), n_params=1e9, tokens=3e9, share=0.25).inside


def test_each_factor_tells_how_far_beyond_its_range() -> None:
    found = distance(grid(), n_params=7e9, tokens=1e8, share=0.1)
    assert found.factors == pytest.approx({"n_params": 7, "tokens": 10, "ratio": 1.2})
    assert not found.inside and found.strong == ("n_params", "tokens")
    assert found.reason == (
        "model size 7 times beyond the measured range, tokens 10 times beyond the measured range, "
        "the ratio outside the measured ones (by 20% of their range)"
    )
    mild = distance(grid(), n_params=4e9, tokens=8e10, share=0.5)
    assert mild.factors["n_params"] == pytest.approx(4) and mild.strong == ()


def test_a_corner_without_runs_is_not_inside() -> None:
    """Long runs were made with small models only."""
    few = rows(np.ones(3), n_params=[1e8, 1e8, 1e9], tokens=[1e9, 1e10, 1e9], share=[0.5, 0.5, 0.5])
    found = distance(few, n_params=9e8, tokens=9e9, share=0.5)
    assert not found.inside and set(found.factors.values()) == {1.0}
    assert found.reason == "within each measured range, but in a corner where no runs are"
    assert distance(few, n_params=2e8, tokens=2e9, share=0.5).inside


def test_what_the_rows_do_not_hold_is_not_part_of_the_distance() -> None:
    plain = rows(np.ones(4), share=[0.0, 0.25, 0.5, 1.0])
    assert distance(plain, n_params=1e9, tokens=1e9, share=0.3).factors == {"ratio": 1.0}
    one_size = rows(np.ones(2), n_params=[1e8, 1e8], tokens=[1e9, 4e9], share=[0.0, 1.0])
    found = distance(one_size, n_params=5e8, tokens=2e9, share=0.5)
    assert found.factors["n_params"] == pytest.approx(5) and not found.inside
    same = rows(np.ones(2), share=[0.5, 0.5])
    beyond = distance(same, share=0.6)
    assert math.isinf(beyond.factors["ratio"]) and json.loads(json.dumps(beyond.to_json()))["factors"]["ratio"] is None


def test_mixtures_are_judged_by_all_their_shares() -> None:
    three = rows(np.ones(3), shares=[[0.6, 0.2, 0.2], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]], corpora=("a", "b", "c"))
    assert distance(three, shares=np.full(3, 1 / 3)).inside
    beyond = distance(three, shares=np.array([0.7, 0.2, 0.1]))
    assert not beyond.inside and beyond.factors["ratio"] == pytest.approx(1.25)
    assert beyond.reason == "the share of `a` outside the measured ones (by 25% of their range)"
    corner = distance(three, shares=np.array([0.5, 0.5, 0.0]))
    assert not corner.inside


@settings(max_examples=50)
@given(weights=st.lists(st.floats(0, 1), min_size=12, max_size=12).filter(lambda w: sum(w) > 0.01))
def test_every_average_of_rows_is_inside(weights: list[float]) -> None:
    measured = grid()
    assert measured.n_params_R is not None and measured.tokens_R is not None and measured.share_R is not None
    part_R = np.array(weights) / sum(weights)
    found = distance(
        measured,
        n_params=float(np.exp(part_R @ np.log(measured.n_params_R))),
        tokens=float(np.exp(part_R @ np.log(measured.tokens_R))),
        share=float(part_R @ measured.share_R),
    )
    assert found.inside
