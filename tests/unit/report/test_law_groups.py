"""The proxies of a law are told as one: in the plan, in the status, on the page, and not as branches of the chain."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cpt.base.files import read_json, write_json
from cpt.base.records import from_json, to_json
from cpt.evaluate.collect import account
from cpt.plan.types import RunPlan
from cpt.report.history import read_run
from cpt.report.page import content
from cpt.report.progress import Progress
from cpt.report.status import read_status, status_text, with_proxies_together
from cpt.stages import state
from tests import made_run
from tests.command import cpt, write_project
from tests.unit.config.test_laws import RECIPE


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The made run, whose `anneal` and `export` are two proxies and their law: one done, one never begun."""
    folder = made_run.make(tmp_path)
    plan = from_json(RunPlan, read_json(folder / "plan.json"))
    done = dataclasses.replace(plan.stages["anneal"], parent="base", group="mix")
    options = {"target": "domain", "law": "dcpt", "target_params": 1, "target_tokens": 1}
    stages = {
        **{n: s for n, s in plan.stages.items() if n in ("base", "domain")},
        "anneal": done,
        "mix-r100": dataclasses.replace(done, name="mix-r100"),
        "mix": dataclasses.replace(plan.stages["export"], name="mix", kind="law", parent="base", options=options),
    }
    write_json(folder / "plan.json", to_json(dataclasses.replace(plan, stages=stages)))
    return folder


def test_the_plan_tells_proxies_in_one_line_with_their_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_project(tmp_path, RECIPE))
    text = cpt("plan", "recipe=two").out
    assert "3 stages and 5 proxies" in text
    assert "law     mix: 5 proxies of 20.0K tokens, 99.8K, 4.8 % of the real run's compute" in text
    assert "law 0, 25, 50, 75, 100 %; measured every 4,000 tokens" in text
    assert "mix-r25" not in text
    assert "≈50.0 %" in text and "≈ from law `mix`" in text


def test_the_status_has_one_row_for_all_proxies_and_says_how_many_are_done(run: Path) -> None:
    status = read_status(run)
    assert [s.name for s in status.stages] == ["base", "domain", "anneal", "mix-r100", "mix"]
    together = with_proxies_together(status.stages)
    assert [s.name for s in together] == ["base", "domain", "mix: 1 of 2 proxies", "mix"]
    proxies = together[2]
    assert proxies.status == state.PENDING
    assert proxies.tokens == 50 * made_run.TOKENS_PER_STEP
    assert proxies.total_tokens == 100 * made_run.TOKENS_PER_STEP
    assert "mix-r100" not in status_text(status, made_run.START)


def test_a_proxy_that_failed_shows_in_the_row_of_all(run: Path) -> None:
    folder = run / "stages" / "mix-r100"
    folder.mkdir()
    state.write(folder, state.State(status=state.FAILED, attempt=1, step=3, reason="out of memory"))
    status = read_status(run)
    assert with_proxies_together(status.stages)[2].status == state.FAILED
    assert "mix-r100: out of memory" in status_text(status, made_run.START)


def test_proxies_are_no_link_and_no_branch_of_the_chain(run: Path) -> None:
    plan = from_json(RunPlan, read_json(run / "plan.json"))
    homes = {name: run / "stages" / name for name in plan.stages}
    found = account(plan, homes)
    assert found.chain == ("base", "domain")
    assert not found.beside
    assert account(plan, homes, "anneal").chain == ("base", "anneal")


def test_the_page_draws_no_proxies_and_adds_up_their_time(run: Path) -> None:
    page = content(read_run(run))
    assert [row["name"] for row in page["stages"]] == ["base", "domain", "mix"]
    assert page["stages"][-1]["schedule"] == "dcpt for domain, 1 of 2 proxies done"
    assert [row["name"] for row in page["times"]] == ["base", "domain", "proxies of mix"]
    assert [row["stage"] for row in page["mixture"]] == ["base", "domain"]


def test_the_time_left_counts_proxies_that_have_not_begun(run: Path) -> None:
    plan = from_json(RunPlan, read_json(run / "plan.json"))
    progress = Progress(plan)
    progress.take("domain", {"kind": "step", "step": 120, "tokens": 120 * 4096, "tokens_per_s": 4096.0})
    progress.take("domain", {"kind": "stage_end"})
    assert progress.seconds_left == pytest.approx(100)
