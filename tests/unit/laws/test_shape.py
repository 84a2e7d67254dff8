"""Shapes: losses that rise and then fall, and the share below which a fitted curve turns."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.laws import shape, table
from cpt.laws.dcpt import DCPT
from cpt.laws.mixing import Mixing
from cpt.laws.result import RiseFall
from cpt.laws.rows import rows
from tests.shared import shared_data
from tests.unit.laws.tables import DOMAIN, GENERAL

BASE = 2.8733676


def found_in(loss: list[float], base: float | None = None, noise: float = 0.0) -> tuple[RiseFall, ...]:
    loss_R = np.array(loss) + noise * np.random.default_rng(0).standard_normal(len(loss))
    tokens = 1e9 * np.arange(1, len(loss) + 1)
    of = rows(loss_R, tokens=tokens, share=np.full(len(loss), 0.25), run=[0] * len(loss))
    base_R = None if base is None else np.full(len(loss), base)
    return shape.rises(of, base_R, {}, {}, "general")


def test_k4_the_general_loss_of_the_python_runs_rises_and_falls_up_to_a_quarter_of_general_text() -> None:
    of = table.read(shared_data("laws", "cpt_pile_python_70m.csv")).with_base({"general": BASE})
    general = of.rows("general").in_order()
    steps = dict(zip(of.line.tolist(), of.step.tolist(), strict=True))
    found = shape.rises(general, general.base_R, steps, {}, "general")
    assert [f.share for f in found] == [0.125, 0.25]
    assert all(3000 <= f.peak_step <= 6000 for f in found)
    assert all(f.peak_loss > BASE and f.last_loss < f.peak_loss for f in found)
    half = general.take(general.share_R == 0.5)
    assert half.loss_R.max() < BASE


def test_k4_a_falling_domain_loss_is_no_rise() -> None:
    of = table.read(shared_data("laws", "cpt_pile_python_70m.csv")).with_base({"domain": 1.8381195068})
    domain = of.rows("domain").in_order()
    assert shape.rises(domain, domain.base_R, {}, {}, "domain") == ()


def test_a_rise_needs_a_later_fall_and_a_fall_an_earlier_rise() -> None:
    assert not found_in([3.0, 2.9, 2.8, 2.75, 2.7, 2.68])
    assert not found_in([2.5, 2.6, 2.7, 2.75, 2.78, 2.8])
    (found,) = found_in([2.5, 2.6, 2.7, 2.65, 2.6, 2.55])
    assert (found.peak_tokens, found.peak_loss, found.last_loss, found.peak_step) == (3e9, 2.7, 2.55, None)


def test_a_rise_that_stays_below_the_base_loss_is_none() -> None:
    humped = [2.5, 2.6, 2.7, 2.65, 2.6, 2.55]
    assert found_in(humped, base=2.6) and not found_in(humped, base=2.75)


def test_a_loss_that_only_fell_since_its_first_measurement_is_no_rise() -> None:
    assert not found_in([2.6, 2.55, 2.5, 2.45, 2.42], base=2.4)


def test_a_single_spike_is_no_rise() -> None:
    smooth = [2.80, 2.79, 2.78, 2.77, 2.76, 2.75, 2.74]
    spiked = [*smooth[:3], 2.95, *smooth[4:]]
    assert not found_in(spiked)


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_rise(seed: int) -> None:
    loss = 2.5 + 0.3 * np.exp(-np.arange(20) / 6) + 0.003 * np.random.default_rng(seed).standard_normal(20)
    assert not found_in(loss.tolist())


def test_runs_of_few_checkpoints_and_tables_without_tokens_have_no_shape() -> None:
    assert not found_in([2.5, 2.7, 2.5])
    assert shape.rises(rows([2.5, 2.7, 2.6, 2.5], run=[0] * 4), None, {}, {}, "general") == ()


@pytest.mark.parametrize("values", [DOMAIN, GENERAL])
def test_the_turning_point_is_where_the_derivative_by_the_share_vanishes(values: dict[str, float]) -> None:
    law = DCPT()
    lowest = shape.lowest_valid_share(law, law.fitted(values), 1.8e9, 1e10)

    def slope(r: float) -> float:
        v = values
        data = v["eta"] * v["B"] * r ** (v["eta"] - 1) / 1e10 ** v["beta"]
        return data - v["gamma"] * v["C"] / (r + v["eps"]) ** (v["gamma"] + 1)

    assert 0 < lowest < 0.05
    assert slope(lowest / 1.05) > 0 > slope(lowest * 1.05)


def test_with_eta_above_one_the_curve_falls_from_the_start() -> None:
    law = DCPT()
    assert shape.lowest_valid_share(law, law.fitted(DOMAIN | {"eta": 1.2}), 1.8e9, 1e12) == 0.0


def test_a_curve_that_only_rises_holds_nowhere() -> None:
    law = Mixing()
    assert shape.lowest_valid_share(law, np.array([2.0, 1.0, -1.0]), None, None) == 1.0
    assert shape.lowest_valid_share(law, np.array([2.0, -1.0, -1.0]), None, None) == 0.0
