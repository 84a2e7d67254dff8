"""A loss that goes on rising with tokens is found, and noise, spikes and the jump of the first steps are not."""

from __future__ import annotations

import numpy as np
import pytest

from cpt.laws import growth, table
from cpt.laws.result import Growth
from cpt.laws.rows import rows
from tests.shared import shared_data
from tests.unit.laws.tables import set_m


def grown(loss_RD: list[list[float]], share: float = 0.25) -> tuple[Growth, ...]:
    """Runs of one ratio."""
    loss = np.array(loss_RD)
    tokens = np.tile(1e9 * np.arange(1, loss.shape[1] + 1), len(loss))
    run = np.repeat(np.arange(len(loss)), loss.shape[1])
    of = rows(loss.reshape(-1), tokens=tokens, share=np.full(loss.size, share), run=run)
    return growth.growing(of, np.full(loss.size, 2.5), "general")


def test_a_steady_rise_is_measured_from_first_to_last_along_its_trend() -> None:
    (found,) = grown([[2.5 + 0.1 * np.log(d) for d in range(1, 7)]])
    assert found.rise == pytest.approx(0.1 * np.log(6)) and found.predicted == 0
    assert (found.share, found.first_tokens, found.last_tokens, found.runs) == (0.25, 1e9, 6e9, (0,))
    assert found.what == "r_general 0.25" and found.n_params is None


def test_a_fall_and_a_level_do_not_rise() -> None:
    assert not grown([[2.5 - 0.1 * np.log(d) for d in range(1, 7)]])
    assert not grown([[2.5] * 6])


def test_noise_is_seldom_a_rise() -> None:
    noise = 0.002 * np.random.default_rng(1).standard_normal((200, 3, 4))
    assert sum(bool(grown((2.5 * np.exp(one)).tolist())) for one in noise) <= 4


@pytest.mark.parametrize("place", range(7))
def test_a_single_spike_is_no_rise(place: int) -> None:
    falls = [2.80, 2.79, 2.78, 2.77, 2.76, 2.75, 2.74]
    falls[place] += 0.2
    assert not grown([falls])


def test_a_jump_in_the_first_steps_is_no_rise() -> None:
    assert not grown([[4.77, 4.873, 4.872, 4.890, 4.877, 4.862, 4.876]])


def test_runs_with_other_levels_are_compared_within_themselves() -> None:
    (found,) = grown([[2.5, 2.52, 2.53, 2.54], [2.7, 2.72, 2.73, 2.74], [2.3, 2.32, 2.33, 2.34]])
    assert found.runs == (0, 1, 2) and 0.03 < found.rise < 0.05


def test_runs_of_a_single_row_are_compared_with_each_other() -> None:
    of = rows([2.5, 2.6, 2.66, 2.7, 2.73], tokens=1e9 * np.arange(1, 6), share=[0.5] * 5, run=range(5))
    assert len(growth.growing(of, np.full(5, 2.5), "general")) == 1


def test_set_m_and_the_python_runs_do_not_go_on_rising() -> None:
    clean = set_m()
    for target in clean.losses:
        of = clean.rows(target).in_order()
        assert growth.growing(of, of.loss_R, target) == ()
    python = table.read(shared_data("laws", "cpt_pile_python_70m.csv"))
    general = python.rows("general").in_order()
    assert growth.growing(general, general.loss_R, "general") == ()
