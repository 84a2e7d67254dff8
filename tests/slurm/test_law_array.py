"""The proxies of a law as one array of jobs; the stage behind the law trains on what it recommends."""

from __future__ import annotations

import json
from pathlib import Path

from cpt.stages import law_values
from cpt.stages.attempt import read_plan
from tests.cli.made_base import write_base, write_corpora
from tests.cli.test_law_run import GRID, HEAD
from tests.slurm.conftest import Cluster
from tests.slurm.test_runs import ON_SLURM, Place


def test_a_grid_is_an_array_and_the_stage_behind_takes_what_the_law_says(tmp_path: Path, cluster: Cluster) -> None:
    write_base(tmp_path / "base", write_corpora(tmp_path)["topics"])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "grid.yaml").write_text(HEAD.format(what="grid") + GRID)
    place = Place(tmp_path, cluster)
    said = place.cpt("run", "recipe=grid", "name=it", *ON_SLURM, "launcher.array_limit=2")
    assert "6 proxies of mix" in said
    jobs = place.jobs("runs")
    proxies = [ids[0] for stage, ids in jobs.items() if stage.startswith("mix-")]
    array = proxies[0].partition("_")[0]
    assert proxies == [f"{array}_{i}" for i in range(6)]
    assert f"mix  sent as job {jobs['mix'][0]}, after {array}" in said
    assert cluster.run("squeue", "-h", "-r", "-j", array, "-t", "R", "-o", "%i", check=False).count("\n") < 2
    place.wait_done("runs", "mix", "domain", seconds=600)
    values, _ = law_values.result(place.run_dir("runs") / "stages" / "mix")
    stage = read_plan(place.run_dir("runs")).stages["domain"]
    assert not stage.assumed
    assert stage.train is not None
    assert (stage.train.replay.share if stage.train.replay else 0.0) == values["replay"]
    first = json.loads((place.run_dir("runs") / "stages" / "domain" / "attempt_1" / "job.json").read_text())
    assert first["queue_job"] == jobs["domain"][0]
