"""What a cluster's file says, on a real cluster: lines of shell that fail, and a recipe's largest job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt.base.files import read_json
from cpt.config.launcher import launcher
from cpt.doctor import check, scheduler
from cpt.launch.slurm.commands import Commands
from cpt.launch.slurm.options import Slurm
from tests.dist import killing
from tests.slurm.conftest import Cluster
from tests.slurm.test_runs import ON_SLURM, TRAIN, Place
from tests.slurm.test_script import Stage, real

__all__ = ["real"]
# One rank of a new model, then four on two nodes.
RECIPE = f"""{killing.TINY}{TRAIN}
stages:
  small:
    from: base
    tokens: 1280
    mixture: {{even: 1}}
    lr: {{schedule: rewarm, peak: 1e-3, warmup: 1}}
    parallel: {{dp: 1}}
  large:
    from: small
    keep: [weights, optimizer]
    tokens: 1280
    mixture: {{odd: 1}}
    lr: {{schedule: constant, peak: 1e-3}}
    parallel: {{dp: 4}}
"""


@pytest.fixture
def place(tmp_path: Path, cluster: Cluster) -> Place:
    """A folder with a recipe and the file of a cluster."""
    return Place(tmp_path, cluster, two=RECIPE)


def test_an_interface_that_nodes_do_not_have_is_said_by_doctor_status_and_log(place: Place) -> None:
    wrong = ("launcher.interface=[nope]",)
    name, made = launcher([*ON_SLURM, *wrong], place.folder)
    commands = Commands(environ=place.cluster.environ, cwd=place.folder)
    found = {c.name: c for c in check.run(scheduler.checks(name, made, place.folder, place.folder, commands))}
    says = "has no network interface that begins with `nope` (`launcher.interface`), only `"
    assert found["interface"].status == "warn" and says in found["interface"].found
    place.cpt("run", "recipe=two", "runs=r", "name=it", *ON_SLURM, *wrong, "--wait", code=3)
    assert says in read_json(place.run_dir("r") / "stages/large/attempt_1/failure.json")["error"]
    assert says in place.cpt("status", "r/it")
    log = place.cpt("logs", "r/it")
    assert says in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("lines", "failed"),
    [
        (["export A=1", "module load nope/1.0"], "(exit code 127): module load nope/1.0"),
        (["source {folder}/activate.sh"], "(exit code 3): source {folder}/activate.sh"),
        (["false || true", "[ -f /none ] && false", "source {folder}/inside.sh", "if false; then", "false", "fi"], ""),
    ],
    ids=["command", "file", "allowed"],
)
def test_a_line_of_the_environment_that_fails_ends_the_job_before_its_ranks(
    real: Cluster, tmp_path: Path, lines: list[str], failed: str
) -> None:
    (tmp_path / "activate.sh").write_text("export B=1\nreturn 3\n")
    (tmp_path / "inside.sh").write_text("false\nexport B=1\n")
    stage = Stage(real, tmp_path)
    id = stage.submit(Slurm(environment=[line.format(folder=tmp_path) for line in lines]))
    state = real.wait(id)
    log = stage.log(id)
    if not failed:
        assert state == "COMPLETED" and "error:" not in log
        return
    assert state == "FAILED" and "ExitCode=2:0" in real.run("scontrol", "show", "job", id)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: `launcher.environment`: this line failed {failed.format(folder=tmp_path)}"]
    assert "hint: a line that may fail ends with `|| true`" in log
    assert stage.attempts() == []


def test_doctor_asks_about_the_largest_job_of_a_recipe(place: Place) -> None:
    def doctor(*words: str, code: int = 0) -> dict[str, str]:
        said = place.cpt("doctor", *words, "--json", code=code)
        return {c["name"]: f"{c['status']}: {c['found']}" for c in json.loads(said)}

    (place.folder / "conf" / "launcher").mkdir(parents=True)
    profile = "name: slurm\npartition: main\nranks_per_node: 2\ncpus_per_rank: 1\nmem: 500M\n"
    (place.folder / "conf" / "launcher" / "mine.yaml").write_text(profile)
    assert doctor("launcher=mine")["nodes"].startswith("ok: 2 of 2 have 2 CPUs, 500M memory for 2 ranks")
    found = doctor("recipe=two", "launcher=mine")
    taken = "ok: Slurm would take the largest job, of stage `large`: 2 nodes of 2 ranks, now, on node[1-2]"
    assert found["submission"] == taken
    found = doctor("recipe=two", "launcher=mine", "stages.large.parallel.dp=6", "train.global_batch_size=6", code=3)
    assert found["nodes"] == "fail: 2 of 2 have 2 CPUs, 500M memory for 2 ranks; stage `large` takes 3"
    assert found["submission"].startswith("fail: Slurm refuses")
    assert place.cluster.run("squeue", "-h") == ""


def test_a_time_above_the_partitions_limit_is_named_at_once(real: Cluster, tmp_path: Path) -> None:
    """In its first moments in the queue such a job has the reason `PartitionConfig`."""
    options = Slurm(partition="short", time="30m", cpus_per_rank=1)
    stage = Stage(real, tmp_path)
    id = stage.submit(options)
    first = options.ask([id])[id]
    assert first.stuck and first.hint == "partition `short` allows 2 min, the job asks for 30 min: `launcher.time=2m`"
    wide = Slurm(partition="short", time="1m", warn=10, nodes=4, ranks_per_node=1)
    id = stage.submit(wide)
    found = wide.ask([id])[id]
    assert found.stuck and "4 nodes" in found.hint and "launcher.time" not in found.hint


def test_who_waits_for_jobs_that_never_start_is_told_so(place: Place) -> None:
    words = ("recipe=two", "runs=r", "name=it", *ON_SLURM, "launcher.partition=short", "launcher.time=30m")
    said = place.cpt("run", *words, "--wait", code=3)
    why = "will not start by itself: PartitionTimeLimit; partition `short` allows 2 min, the job asks for 30 min"
    assert f"error: job {place.job('r', 'small')} {why}" in said and "`cpt cancel it` takes them out" in said
    assert len(place.cluster.run("squeue", "-h", "-o", "%i").split()) == 2
    place.cpt("cancel", "r/it", "--wait")


def test_status_and_who_waits_say_which_line_of_the_environment_failed(place: Place) -> None:
    said = place.cpt(
        *("run", "recipe=two", "runs=r", "name=it", *ON_SLURM, "--wait"),
        'launcher.environment=["export A=1", "module load nope/1.0"]',
        code=1,
    )
    line = "error: `launcher.environment`: this line failed (exit code 127): module load nope/1.0"
    assert line in said and "ended: FAILED (exit code 2) before the stage began" in said
    status = place.cpt("status", "r/it")
    assert line in status and "failed" in status
