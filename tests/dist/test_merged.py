"""A law from weight averages, through the command: one proxy for each source, candidates measured without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpt.base.files import read_lines
from cpt.laws.saved import SavedLaw
from cpt.stages import state
from tests.dist import killing
from tests.dist.killing import Runs

RECIPE = (
    killing.TINY
    + """
train:
  seq_length: 64
  global_batch_size: 4
  micro_batch_size: 4
  precision: fp32
  broken_import_guard: false
  evaluate: {tokens: 2048}
stages:
  pretrain:
    from: base
    tokens: 1024
    mixture: {even: 0.5, odd: 0.5}
    lr: {schedule: constant, peak: 1e-3}
  mix:
    kind: law
    from: pretrain
    for: domain
    domain: [odd]
    general: [even]
    how: merge
    tokens: 2048
    max_cost: 400%
    draws: 0
  domain:
    from: pretrain
    keep: [weights]
    tokens: 2048
    mixture: "${law:mix.mixture}"
    lr: {schedule: constant, peak: 1e-3}
"""
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("merge")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "merge.yaml").write_text(RECIPE)
    killing.write_topics(folder)
    return Runs(folder, recipe="merge").finish("first")


def evaluations(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(run_dir / "stages" / stage / "attempt_1" / "events.jsonl") if e["kind"] == "eval"]


def test_one_proxy_for_each_source_and_an_average_for_each_candidate(done: Any) -> None:
    stages = {p.name for p in (done.run_dir / "stages").iterdir()}
    assert {"mix-even", "mix-odd", "mix-merged", "mix"} <= stages, done.text()[-3000:]
    found = evaluations(done.run_dir, "mix-merged")
    assert [e["mixture"].get("odd", 0.0) for e in found] == [i / 8 for i in range(9)]
    assert {e["tokens"] for e in found} == {2048}


def test_the_average_of_one_proxy_is_that_proxy(done: Any) -> None:
    found = evaluations(done.run_dir, "mix-merged")
    for candidate, proxy in ((found[0], "mix-even"), (found[-1], "mix-odd")):
        own = evaluations(done.run_dir, proxy)[-1]
        for source in ("even", "odd"):
            assert candidate["losses"][source]["loss"] == pytest.approx(own["losses"][source]["loss"], abs=1e-6)


def test_candidates_too_close_to_rank_stop_the_run_before_the_stage_that_would_use_them(done: Any) -> None:
    saved = SavedLaw.load(done.run_dir / "stages" / "mix")
    assert saved.verdict == "unfit" and any("too close to rank, below 0.1" in text for text in saved.unfit)
    assert done.process.returncode == 2
    assert "too close to rank" in done.text()
    assert state.read(done.run_dir / "stages" / "mix").status == state.DONE
    assert state.read(done.run_dir / "stages" / "domain").status == state.PENDING
