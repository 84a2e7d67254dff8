"""The loop on real models: proxies, a law, and the mixture that a later stage takes from it; stops and resumes too."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cpt.stages import state
from tests.cli.made_base import write_base, write_corpora

pytestmark = pytest.mark.dist

HEAD = """\
# {what}
base: {{checkpoint: base}}
sources:
  topics: {{paths: topics.jsonl, valid: 10%}}
  code: {{paths: code.jsonl, valid: 10%}}
train:
  {{seq_length: 64, global_batch_size: 8, micro_batch_size: 8, precision: fp32, broken_import_guard: false,
   evaluate: {{tokens: 2k}}, parallel: {{dp: 1}}}}
stages:
"""
GRID = """\
  mix: {kind: law, law: mixing, ratios: [0, 0.2, 0.4, 0.6, 0.8, 1], tokens: 3k, draws: 5, max_cost: 400%}
  domain:
    from: base
    keep: [weights]
    tokens: 5k
    mixture: {code: 1}
    replay: {from: base, share: "${law:mix.replay}", sources: [topics]}
    lr: {schedule: constant, peak: 2e-3, warmup: 10%}
"""
TABLE = """\
  mix: {kind: law, law: dcpt, data: runs.csv, draws: 5, tolerance: 5%, domain: [code], general: [topics]}
  domain:
    from: base
    keep: [weights]
    tokens: 5k
    mixture: "${law:mix.mixture}"
    lr: {schedule: constant, peak: 2e-3, warmup: 10%}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base with random weights, two corpora, and recipes `grid` and `table`."""
    corpora = write_corpora(tmp_path)
    write_base(tmp_path / "base", corpora["topics"])
    (tmp_path / "recipes").mkdir()
    for name, stages in (("grid", GRID), ("table", TABLE)):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(HEAD.format(what=name) + stages)
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environ = {k: v for k, v in os.environ.items() if k not in ("CPT_CACHE", "PYTHONPATH")}
    return subprocess.Popen(
        [sys.executable, "-m", "cpt", *arguments],
        cwd=folder,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def cpt(folder: Path, *arguments: str) -> tuple[int, str, str]:
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def run_dir(folder: Path) -> Path:
    return next((folder / "runs").iterdir())


def plan_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "plan.json").read_text())
    return found


def attempts(run: Path, stage: str) -> int:
    return len(list((run / "stages" / stage).glob("attempt_*")))


def test_a_grid_that_is_stopped_goes_on_where_it_was_and_another_run_takes_it_over(folder: Path) -> None:
    command = start(folder, "fit-law", "recipe=grid")
    third = "stages/mix-r40"
    deadline = time.monotonic() + 600
    while not list(folder.glob(f"runs/*/{third}/attempt_1/events.jsonl")):
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=300)
    assert command.returncode == 75, err[-2000:]
    run = run_dir(folder)
    assert not (run / "stages" / "mix" / "law.json").exists()
    done = [n for n in plan_of(run)["stages"] if state.read(run / "stages" / n).status == state.DONE]
    assert done[:2] == ["mix-r0", "mix-r20"] and "mix-r100" not in done

    code, out, err = cpt(folder, "fit-law", "recipe=grid", "--json")
    assert code == 0, err[-2000:]
    assert [attempts(run, n) for n in done] == [1] * len(done)
    said = json.loads(out)
    assert (said["law"], said["run"]) == ("mixing", str(run))
    assert Path(said["files"]["law"]) == run / "stages" / "mix" / "law.json"
    with open(run / "stages" / "mix" / "table.csv") as file:
        ratios = [row["r_domain"] for row in csv.DictReader(file) if row["r_domain"]]
    assert [round(float(r), 3) for r in ratios] == [0, 0.2, 0.4, 0.6, 0.8, 1]

    # The whole recipe: nothing of the grid runs again, and the law decides what becomes of `domain`.
    code, _, err = cpt(folder, "run", "recipe=grid", "name=whole")
    whole = folder / "runs" / "whole"
    assert all(attempts(whole, n) == 0 for n in plan_of(run)["stages"])
    assert state.read(whole / "stages" / "mix").reference == str(run / "stages" / "mix")
    if said["verdict"] == "unfit":
        assert code == 2 and "from the law `mix`, which must not be used" in err
        assert "stages.domain.replay.share=" in err
        assert attempts(whole, "domain") == 0
    else:
        assert code == 0, err[-2000:]
        replay = plan_of(whole)["stages"]["domain"]["train"]["replay"]
        ratio = said["recommendation"]["ratio"]["value"]
        assert (replay["share"] if replay else 0.0) == pytest.approx(1 - ratio)


def _loss(floor: float, b: float, eta: float, c: float, share: float, tokens: int) -> float:
    return floor + b * share**eta / tokens**0.3 + c / (share + 0.1) ** 0.5


def test_a_stage_trains_on_what_the_law_recommends_and_the_id_stays(folder: Path) -> None:
    with open(folder / "runs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "n_params", "tokens", "r_domain", "loss_domain", "loss_general"])
        table.writerow(["base", 83664, 0, "", 6.0, 3.7])
        for ratio in (0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1):
            for tokens in (1000, 2000, 4000, 8000):
                losses = (
                    _loss(3.0, 2, 0.5, 0.6, ratio, tokens),
                    _loss(3.2, 1.5, 0.4, 0.3, 1 - ratio, tokens),
                )
                table.writerow([f"r{ratio}", 83664, tokens, ratio, *losses])
    code, out, err = cpt(folder, "run", "recipe=table")
    assert code == 0, err[-2000:]
    run = run_dir(folder)
    values = json.loads((run / "stages" / "mix" / "law.json").read_text())["values"]
    assert 0.1 < values["ratio"] < 0.95
    plan = plan_of(run)
    domain = plan["stages"]["domain"]
    assert domain["train"]["mixture"] == pytest.approx({"code": values["ratio"], "topics": values["replay"]})
    assert domain["assumed"] is False
    assert run.name == f"table-{plan['id'][:6]}"
    events = (run / "stages" / "domain" / "attempt_1" / "events.jsonl").read_text().splitlines()
    given = [json.loads(e)["given"] for e in events if '"kind": "step"' in e or '"kind":"step"' in e][-1]
    assert given["code"] / sum(given.values()) == pytest.approx(values["ratio"], abs=0.02)
    assert "law `mix`: code" in err
    assert "law.html" in out

    code, _, err = cpt(folder, "run", "recipe=table")
    assert code == 0
    assert (attempts(run, "mix"), attempts(run, "domain")) == (1, 1)
    assert plan_of(run) == plan
    changed = cpt(folder, "plan", "recipe=table")[1]
    assert "≈" not in changed.partition("law     mix")[0]
    assert "from law `mix`" in changed


def test_fit_law_plans_a_law_for_a_recipe_that_has_none(folder: Path) -> None:
    grid = folder / "recipes" / "grid.yaml"
    lines = [line for line in grid.read_text().splitlines() if not line.startswith("  mix:")]
    grid.write_text("\n".join(lines).replace('"${law:mix.replay}"', "10%") + "\n")
    given = ["fit-law", "recipe=grid", "stages.domain.tokens=2M", "ratios=[0,0.3,0.6,1]", "--dry-run"]
    code, out, err = cpt(folder, *given)
    assert code == 0, err
    assert "mix: 4 proxies of 99.8K tokens" in out
    assert "1 stage and 4 proxies" in out
    assert "the recipe has no law stage: one for `domain` is planned" in err
    assert not (folder / "runs").exists()
    assert "unknown law stage `mixx`" in cpt(folder, *given, "stage=mixx")[2]
