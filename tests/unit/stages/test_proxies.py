"""What proxies measured becomes the table of their law; a missing, partial or unmeasured one is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cpt.base.errors import UsageError
from cpt.stages import state
from cpt.stages.law import options_of
from cpt.stages.proxies import collect
from tests.unit.stages import proxy_grid as grid


def collected(made):
    plan, run = made
    return collect(plan, "mix", options_of(plan, "mix"), run)


def test_every_measurement_after_the_warmup_is_a_row_with_its_ratio_and_group_losses(tmp_path):
    found = collected(grid.make(tmp_path))
    table = found.table
    assert found.notes == ()
    assert len(table) == len(grid.RATIOS) * 6 and table.num_runs == len(grid.RATIOS)
    assert sorted(set(table.shares["domain"])) == list(grid.RATIOS)
    i = table.run.index("mix-r25") + 2
    assert table.tokens[i] == 30 * grid.STEP and table.step[i] == 30
    assert table.losses["general"][i] == pytest.approx(grid.truth(grid.GENERAL, 30 * grid.STEP, 0.75))
    assert table.losses["domain"][i] == pytest.approx(grid.truth(grid.DOMAIN, 30 * grid.STEP, 0.25))


def test_a_groups_loss_weighs_its_sources_by_the_target_stages_shares(tmp_path):
    made = grid.make(tmp_path, options={"general": {"web": 0.75, "wiki": 0.25}})
    table = collected(made).table
    i = table.run.index("mix-r25")
    # `web` lies 0.1 above and `wiki` 0.1 below the law: 0.75 · 0.1 - 0.25 · 0.1 = 0.05 above it.
    assert table.losses["general"][i] == pytest.approx(grid.truth(grid.GENERAL, table.tokens[i], 0.75) + 0.05)


def test_measurements_before_the_first_step_are_the_base_model_once(tmp_path):
    table = collected(grid.make(tmp_path)).table
    assert len(table.base) == 1
    assert table.base_loss("general", grid.MODEL.num_parameters) == pytest.approx(grid.BASE["general"])


def test_measurements_inside_the_warmup_are_left_out(tmp_path):
    table = collected(grid.make(tmp_path, options={"warmup": 20 * grid.STEP})).table
    assert table.step.min() == 30


def test_unfinished_proxies_are_named_all_at_once(tmp_path):
    plan, run = grid.make(tmp_path)
    for name, changes in {
        "mix-r25": {"status": "saved", "step": 12},
        "mix-r50": {"status": "pending", "step": 0},
    }.items():
        folder = run / "stages" / name
        state.write(folder, dataclasses.replace(state.read(folder), **changes))
    with pytest.raises(
        UsageError, match=r"law `mix` waits for `mix-r25` \(saved at step 12 of 60\), `mix-r50` \(pending\)"
    ):
        collected((plan, run))


def test_a_proxy_without_measurements_is_named(tmp_path):
    plan, run = grid.make(tmp_path)
    grid.rewrite(run, "mix-r75", lambda events: [e for e in events if e.get("when") in (None, "start")])
    with pytest.raises(UsageError, match="proxy `mix-r75` left no measurement after its warmup of 5,120,000 tokens"):
        collected((plan, run))


def test_a_proxy_that_was_not_measured_at_its_end_is_told(tmp_path):
    plan, run = grid.make(tmp_path)
    grid.rewrite(run, "mix-r75", lambda events: events[:-1])
    found = collected((plan, run))
    assert found.notes == ("proxy `mix-r75` was last measured at step 50 of 60",)
    assert found.table.run.count("mix-r75") == 5


def test_a_loss_that_was_no_number_leaves_a_gap_that_is_told(tmp_path):
    def without_wiki(events):
        events[3]["losses"]["wiki"]["loss"] = None
        return events

    plan, run = grid.make(tmp_path)
    grid.rewrite(run, "mix-r50", without_wiki)
    found = collected((plan, run))
    assert found.notes == ("`mix-r50` has measurements without a loss on `wiki`, which are left out",)
    i = found.table.run.index("mix-r50") + 1
    assert np.isnan(found.table.losses["general"][i]) and np.isfinite(found.table.losses["domain"][i])


def test_a_proxy_that_another_run_did_is_read_there(tmp_path):
    plan, run = grid.make(tmp_path)
    moved = tmp_path / "elsewhere" / "mix-r25"
    moved.parent.mkdir()
    (run / "stages" / "mix-r25").rename(moved)
    state.write(run / "stages" / "mix-r25", dataclasses.replace(state.read(moved), reference=str(moved), status="done"))
    assert collected((plan, run)).table.run.count("mix-r25") == 6


def test_averages_of_proxies_are_runs_of_their_own(tmp_path):
    table = collected(grid.make(tmp_path, how="merge")).table
    assert table.num_runs == len(table) == len(grid.RATIOS)
    assert sorted(table.shares["domain"]) == list(grid.RATIOS)
    assert set(table.tokens) == {grid.STEPS * grid.STEP}
    assert table.base_loss("domain", grid.MODEL.num_parameters) == pytest.approx(grid.BASE["domain"])


def test_mixtures_of_more_than_two_groups_have_a_share_and_a_loss_for_each_source(tmp_path):
    plan, run = grid.make(tmp_path, options={"mixtures": [grid.mixture(r) for r in grid.RATIOS], "ratios": []})
    table = collected((plan, run)).table
    assert set(table.shares) == set(table.losses) == {"pubmed", "web", "wiki"}
    assert table.shares["web"][table.run.index("mix-r50")] == 0.25
