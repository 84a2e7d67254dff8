"""Exact values at the corners of every curve, and properties that hold everywhere."""

import dataclasses
import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import PlanError, UsageError
from cpt.schedules import SCHEDULES, make
from cpt.schedules.length import num_steps, parse_length
from cpt.schedules.shapes import COEFFICIENTS

EXACT = {"rel": 1e-12, "abs": 0}


def values(name, span, start_lr=0.0, **options):
    schedule = make(name, options).complete(start_lr)
    schedule.fits(span)
    return [schedule.lr(n, span, start_lr) for n in range(span)]


def test_rewarm_meets_its_formula_at_every_corner():
    top, low, span = 3e-4, 3e-5, 1000
    lr = values("rewarm", span, peak=top, end=low, warmup="1%")
    assert lr[0] == pytest.approx(top / 10, **EXACT)
    assert lr[9] == pytest.approx(top, **EXACT)
    assert lr[10] == pytest.approx(top, **EXACT)
    assert lr[999] == low
    middle = low + (top - low) / 2 * (1 + math.cos(math.pi * (500 - 10) / (1000 - 1 - 10)))
    assert lr[500] == pytest.approx(middle, **EXACT)


def test_rewarm_from_the_parents_lr_starts_one_step_above_it():
    lr = values("rewarm", 1000, start_lr=1e-5, peak=3e-4, warmup="1%", start="parent")
    assert lr[0] == pytest.approx(1e-5 + (3e-4 - 1e-5) / 10, **EXACT)
    assert lr[999] == pytest.approx(3e-5, **EXACT)
    cold = values("rewarm", 1000, start_lr=1e-5, peak=3e-4, warmup="1%", start=0)
    assert cold[0] == pytest.approx(3e-5, **EXACT)


@pytest.mark.parametrize("shape", ["linear", "cosine", "inverse_sqrt"])
def test_infinite_meets_its_formula_at_every_corner(shape):
    options = {"peak": 3e-4, "constant": 1.65e-4, "end": 3e-5, "shape": shape}
    lr = values("infinite", 100, warmup="1%", cooldown="60%", anneal="14%", **options)
    assert lr[0] == pytest.approx(3e-4, **EXACT)
    assert lr[1] == pytest.approx(3e-4, **EXACT)
    half = {
        "linear": 3e-4 + (1.65e-4 - 3e-4) * 0.5,
        "cosine": 1.65e-4 + (3e-4 - 1.65e-4) * (1 + math.cos(math.pi * 0.5)) / 2,
        "inverse_sqrt": 3e-4 + (1.65e-4 - 3e-4) * (1 / math.sqrt(6) - 1) / (1 / math.sqrt(11) - 1),
    }[shape]
    assert lr[31] == pytest.approx(half, **EXACT)
    assert lr[61:87] == [1.65e-4] * 26
    for n in range(86, 100):
        assert lr[n] == pytest.approx(1.65e-4 * (3e-5 / 1.65e-4) ** ((n - 86) / 14), **EXACT)


def test_infinite_is_continuous_at_its_three_joints():
    lr = values("infinite", 2000, peak=1e-3, warmup="5%", cooldown="40%", anneal="10%", shape="linear")
    for joint in (100, 900, 1800):
        slopes = [abs(lr[joint + k + 1] - lr[joint + k]) for k in (-3, -2, 1, 2)]
        assert abs(lr[joint] - lr[joint - 1]) <= max(slopes) * (1 + 1e-9)


def test_inverse_sqrt_cooldown_is_convex():
    lr = values("infinite", 1000, peak=1e-3, warmup="1%", cooldown="60%", shape="inverse_sqrt")[10:610]
    assert all(a + c >= 2 * b - 1e-15 for a, b, c in zip(lr, lr[1:], lr[2:], strict=False))


def test_wsd_shapes_agree_at_both_ends():
    for name, c in COEFFICIENTS.items():
        assert c(0) == pytest.approx(1, abs=1e-12), name
        assert c(1) == pytest.approx(0, abs=1e-12), name


@pytest.mark.parametrize(
    ("shape", "at_quarter"),
    [
        ("linear", 0.75),
        ("cosine", (1 + math.cos(math.pi / 4)) / 2),
        ("exponential", 2 * 0.5**0.25 - 1),
        ("minus_sqrt", 0.5),
    ],
)
def test_wsd_meets_its_formula(shape, at_quarter):
    lr = values("wsd", 1000, peak=1e-3, end=1e-4, warmup="2%", decay="40%", shape=shape)
    assert lr[0] == pytest.approx(1e-3 / 20, **EXACT)
    assert lr[19] == pytest.approx(1e-3, **EXACT)
    assert set(lr[20:601]) == {1e-3}
    assert lr[700] == pytest.approx(1e-4 + 9e-4 * at_quarter, **EXACT)
    schedule = make("wsd", {"peak": 1e-3, "end": 1e-4, "warmup": "2%", "decay": "40%", "shape": shape})
    assert schedule.lr(1000, 1000, 0.0) == pytest.approx(1e-4, **EXACT)
    assert schedule.lr(5000, 1000, 0.0) == pytest.approx(1e-4, **EXACT)


def test_infinite_without_cooldown_is_wsd_with_a_geometric_decay():
    infinite = values("infinite", 500, peak=1e-3, end=1e-5, constant=1e-3, warmup="4%", cooldown=0, anneal="20%")
    wsd = values("wsd", 500, peak=1e-3, end=1e-5, warmup="4%", decay="20%", shape="geometric")
    assert infinite == pytest.approx(wsd, **EXACT)
    assert wsd[450] == pytest.approx(1e-3 * 0.01**0.5, **EXACT)


def test_inverse_sqrt_halves_at_four_times_the_warmup():
    lr = values("inverse_sqrt", 1000, peak=2e-3, end=5e-4, warmup="100 steps")
    assert lr[99] == pytest.approx(2e-3, **EXACT)
    assert lr[100] == pytest.approx(2e-3, **EXACT)
    assert lr[400] == pytest.approx(1e-3, **EXACT)
    assert min(values("inverse_sqrt", 9000, peak=2e-3, end=5e-4, warmup="100 steps")[100:]) == 5e-4


def test_linear_falls_from_the_parents_lr_to_zero_exactly():
    lr = values("linear", 11, start_lr=1e-4)
    assert lr[0] == 1e-4
    assert lr[5] == pytest.approx(5e-5, **EXACT)
    assert lr[10] == 0.0


def test_constant_holds_the_parents_lr():
    assert values("constant", 5, start_lr=7e-5) == [7e-5] * 5
    assert values("constant", 5, start_lr=7e-5, peak=1e-4) == [1e-4] * 5


@pytest.mark.parametrize("name", ["wsd", "infinite"])
def test_extending_a_stage_moves_the_decay_and_touches_nothing_before_it(name):
    options = {"peak": 1e-3, "warmup": "10 steps"}
    options |= {"decay": "50 steps"} if name == "wsd" else {"cooldown": "100 steps", "anneal": "50 steps"}
    short, long = values(name, 400, **options), values(name, 700, **options)
    assert short[:350] == long[:350]
    assert short[350:400] == long[650:700]
    assert make(name, options).anneal_start(400) == 350
    assert make(name, options).anneal_start(700) == 650


shares = st.floats(0, 0.3)


@st.composite
def any_schedule(draw):
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    kind = SCHEDULES.get(name)
    peak = draw(st.floats(1e-6, 1e-1))
    options = {"peak": peak, **{length: draw(shares) for length in kind.lengths}}
    fields = kind.__dataclass_fields__
    if "shape" in fields:
        shapes = ["linear", "cosine", "inverse_sqrt"] if name == "infinite" else ["linear", "exponential", "geometric"]
        options["shape"] = draw(st.sampled_from(shapes))
    if name == "rewarm":
        options["start"] = draw(st.sampled_from([0, "parent"]))
    if "end" in fields:
        options["end"] = draw(st.floats(1e-3, 0.4)) * peak
    return name, options


@given(any_schedule(), st.integers(1, 400), st.floats(0, 1e-1))
def test_no_curve_ever_leaves_the_band_between_zero_and_its_peak(case, span, start_lr):
    name, options = case
    for lr in values(name, span, start_lr=start_lr, **options):
        assert 0 <= lr <= options["peak"] * (1 + 1e-12)


@given(any_schedule(), st.integers(2, 400))
def test_between_its_corners_a_curve_only_rises_or_only_falls(case, span):
    name, options = case
    schedule = make(name, options).complete(0.0)
    lr = values(name, span, **options)
    borders = sorted({0, span - 1, *(c for c in schedule.corners(span) if 0 <= c < span)})
    for a, b in itertools.pairwise(borders):
        part = lr[a : b + 1]
        slack = 1e-12 * options["peak"]
        rises = all(y >= x - slack for x, y in itertools.pairwise(part))
        falls = all(y <= x + slack for x, y in itertools.pairwise(part))
        assert rises or falls


@given(any_schedule(), st.integers(1, 3000))
def test_lengths_written_in_steps_give_the_same_curve_as_shares(case, span):
    name, options = case
    schedule = make(name, options).complete(0.0)
    placed = schedule.placed(span)
    again = dataclasses.replace(schedule, **{k: f"{v} steps" for k, v in placed.items()})
    for n in {0, span // 3, span // 2, span - 1}:
        assert again.lr(n, span, 0.0) == schedule.lr(n, span, 0.0)


@pytest.mark.parametrize(
    ("written", "unit", "steps"),
    [
        ("1%", "share", 10),
        (0.07, "share", 70),
        ("0.5", "share", 500),
        (1, "share", 1000),
        (0, "share", 0),
        ("200 steps", "steps", 200),
        ("1 step", "steps", 1),
        ("1.5K steps", "steps", 1500),
        ("500K", "tokens", 123),
        (8193, "tokens", 3),
        ("8192 tokens", "tokens", 2),
    ],
)
def test_lengths_are_shares_steps_or_tokens(written, unit, steps):
    assert parse_length("warmup", written)[0] == unit
    assert num_steps(written, 1000, tokens_per_step=4096) == steps


@pytest.mark.parametrize("bad", [True, None, "x", "", "-1%", "101%", "-5", "nan", "1.5 steps", "steps", [1], "10 %%"])
def test_a_wrong_length_is_refused_with_the_accepted_forms(bad):
    with pytest.raises(UsageError, match=r"`warmup` is .*accepted forms"):
        make("cosine", {"peak": 1e-3, "warmup": bad})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosine", {"peak": 0}, "`peak` is 0"),
        ("cosine", {"peak": -1e-3}, "`peak` is"),
        ("cosine", {"peak": "fast"}, "wanted an lr such as"),
        ("cosine", {"peak": True}, "wanted an lr"),
        ("cosine", {"peak": float("nan")}, "wanted an lr"),
        ("cosine", {"peak": 1e-3, "end": 2e-3}, "`end` is 0.002, wanted at most `peak`, 0.001"),
        ("wsd", {"peak": 1e-3, "shape": "sqrt"}, "`shape` is `sqrt`, wanted one of"),
        ("wsd", {"peak": 1e-3, "shape": ["linear"]}, "`shape` is"),
        ("wsd", {"peak": 1e-3, "shape": "geometric", "end": 0}, "never reaches"),
        ("wsd", {"peak": 1e-3, "warmup": "60%", "decay": "60%"}, "more than the whole span"),
        ("infinite", {"peak": 1e-3, "constant": 2e-3}, "`constant` is"),
        ("infinite", {"peak": 1e-3, "constant": 0}, "`constant` is 0"),
        ("infinite", {"peak": 1e-3, "end": 0, "anneal": "10%"}, "never reaches"),
        ("infinite", {"peak": 1e-3, "cooldown": "90%", "anneal": "20%"}, "more than the whole span"),
        ("rewarm", {"peak": 1e-3, "start": "base"}, "`start` is `base`, wanted `0` or `parent`"),
        ("cosine", {"peak": 1e-3, "decay": "10%"}, "unknown option of the schedule `cosine`: `decay`"),
        ("cosin", {"peak": 1e-3}, "unknown schedule `cosin`"),
    ],
)
def test_a_schedule_refuses_wrong_values_itself(name, options, message):
    with pytest.raises(UsageError) as error:
        make(name, options)
    assert message in error.value.message


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(PlanError, match=r"`warmup` 50 \+ `decay` 80 steps are more than the 100 steps"):
        make("wsd", {"peak": 1e-3, "warmup": "50 steps", "decay": "80 steps"}).fits(100)
    with pytest.raises(PlanError, match="longer than the 100 steps"):
        make("cosine", {"peak": 1e-3, "warmup": "101 steps"}).fits(100)
    make("infinite", {"peak": 1e-3, "warmup": "500 steps"}).fits(100)  # no planned end: the run may go on


def test_an_lr_as_yaml_reads_it_is_understood():
    assert make("constant", {"peak": "3e-5"}).peak == 3e-5


def test_schedules_need_neither_torch_nor_numpy():
    code = "import sys, cpt.schedules; print(sorted({'torch', 'numpy', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
