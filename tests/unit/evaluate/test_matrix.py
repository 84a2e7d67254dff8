"""Every measure on matrices worked by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.evaluate import Matrix, fuar, retained_share

# Rows: untouched start, after stages 1 to 3. Columns: domains learned in stages 1 to 3. Scores, more is better.
SCORES = ((10.0, 20.0, 30.0), (50.0, 25.0, 30.0), (40.0, 60.0, 36.0), (45.0, 55.0, 70.0))
IDENTITY = {"a": 1, "b": 2, "c": 3}


def matrix(scores=SCORES, domains=("a", "b", "c"), learned=None):
    stages = tuple(f"s{k}" for k in range(1, len(scores)))
    return Matrix(stages=stages, domains=domains, scores=scores, learned=learned or IDENTITY)


def test_average_after_each_stage_counts_what_was_learned_by_then():
    assert matrix().average_after(1).value == 50.0
    assert matrix().average_after(2).value == (40 + 60) / 2
    assert matrix().average_after(3).value == pytest.approx((45 + 55 + 70) / 3)


def test_backward_transfer():
    measured = matrix().backward_transfer()
    assert (measured.value, measured.over) == (((45 - 50) + (55 - 60)) / 2, 2)


def test_forward_transfer_counts_from_the_untouched_start():
    measured = matrix().forward_transfer()
    assert (measured.value, measured.over) == (((25 - 20) + (36 - 30)) / 2, 2)


def test_forgetting_takes_the_best_earlier_score_and_may_be_negative():
    assert [matrix().forgetting_of(d) for d in "abc"] == [50 - 45, 60 - 55, 36 - 70]
    measured = matrix().forgetting()
    assert (measured.value, measured.over) == ((5 + 5 - 34) / 3, 3)


def test_forgetting_of_older_domains_leaves_the_newest_gain_out():
    measured = matrix().forgetting_of_older()
    assert (measured.value, measured.over) == ((5 + 5) / 2, 2)


def test_overall_performance():
    assert matrix().overall().value == pytest.approx(170 / 3)


def test_learned_and_retained_loss():
    losses = [[4.0, 4.0, 4.0], [2.0, 3.9, 4.0], [2.5, 1.0, 3.0], [2.4, 1.4, 1.2]]
    m = Matrix.of_losses(("s1", "s2", "s3"), ("a", "b", "c"), losses, IDENTITY)
    assert m.learned_loss().value == pytest.approx((2.0 + 1.0 + 1.2) / 3)
    assert m.retained_loss().value == pytest.approx((2.4 + 1.4 + 1.2) / 3)
    assert m.backward_transfer().value == pytest.approx(-0.4)
    assert m.forgetting_of("a") == pytest.approx(0.4)


def test_losses_and_scores_agree_in_sign():
    losses = [[-s for s in row] for row in SCORES]
    assert Matrix.of_losses(("s1", "s2", "s3"), ("a", "b", "c"), losses, IDENTITY) == matrix()


def test_fuar_counts_forgotten_against_gained():
    # Newest domain: c. Old: a (known from stage 1), b (from stage 2).
    # F: model 1 knows a (50 -> 45), model 2 knows a and b (50 -> 50). A: 30, 30, 36 -> 70.
    assert matrix().fuar() == pytest.approx((5 + 0) / (40 + 40 + 34))


def test_fuar_is_one_for_one_forgotten_per_gained():
    assert fuar([(10.0, 9.0)], (), [5.0, 6.0]) == 1.0


def test_fuar_counts_updated_and_acquired():
    assert fuar([(3.0, 1.0), (2.0, 4.0)], [0.0, 1.0, 2.0], [1.0, 1.0, 2.0]) == pytest.approx(2 / (2 + 1 + 1 + 1))


def test_fuar_without_any_gain_has_no_value():
    assert fuar([(10.0, 1.0)], (), [5.0, 4.0]) is None
    assert fuar([(10.0, 1.0)], (), ()) is None


def test_a_missing_row_0_is_an_error():
    with pytest.raises(UsageError, match="row 0 is the untouched start"):
        Matrix(stages=("s1", "s2", "s3"), domains=("a", "b", "c"), scores=SCORES[1:], learned=IDENTITY)


def test_a_ragged_matrix_is_an_error():
    with pytest.raises(UsageError, match="different length"):
        matrix(scores=(*SCORES[:3], (1.0, 2.0)))


def test_a_source_without_a_stage_is_an_error():
    with pytest.raises(UsageError, match="source `c`"):
        matrix(learned={"a": 1, "b": 2})


def test_one_stage_leaves_the_transfers_without_a_value():
    m = matrix(scores=SCORES[:2], learned={"a": 1, "b": 0, "c": 0})
    assert m.backward_transfer().value is None and m.forward_transfer().value is None
    assert m.forgetting_of("b") == -5


finite = st.floats(-50, 50)


@given(st.lists(st.tuples(finite, finite, finite), min_size=4, max_size=4), st.permutations(["a", "b", "c"]))
def test_no_measure_depends_on_names_or_their_order(rows, order):
    plain = matrix(scores=tuple(rows))
    columns = {d: [row["abc".index(d)] for row in rows] for d in "abc"}
    renamed = matrix(
        scores=tuple(tuple(columns[d][k] for d in order) for k in range(4)),
        domains=tuple(f"x {d}" for d in order),
        learned={f"x {d}": IDENTITY[d] for d in order},
    )
    for name in ("overall", "backward_transfer", "forward_transfer", "forgetting", "learned_loss", "retained_loss"):
        one, other = getattr(plain, name)(), getattr(renamed, name)()
        assert one.over == other.over and one.value == pytest.approx(other.value, abs=1e-9)
    assert plain.fuar() == (pytest.approx(renamed.fuar()) if renamed.fuar() is not None else None)


def test_retained_share():
    uniform = math.log(1000)
    assert retained_share(3.0, 3.0, uniform) == 1.0
    assert retained_share(3.0, uniform, uniform) == 0.0
    assert retained_share(uniform, 3.0, uniform) is None
