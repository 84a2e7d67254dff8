"""Jobs that end before their stage begins, or whose ranks cannot be started, jobs sent by hand, deleted runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.base.errors import FAILED
from cpt.base.files import read_json
from cpt.stages import send, state
from cpt.stages.attempt import read_plan
from tests.dist import killing
from tests.slurm.conftest import Cluster
from tests.slurm.test_runs import ON_SLURM, TRAIN, Place

# Nothing here ends a stage: what happens does so at its start, or while it trains.
RECIPE = f"""{killing.TINY}{TRAIN}
stages:
  long:
    from: base
    tokens: 2560000
    mixture: {{even: 0.5, odd: 0.5}}
    lr: {{schedule: rewarm, peak: 1e-3, warmup: 4}}
  short:
    from: long
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 1280
    mixture: {{odd: 1}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Place:
    return Place(tmp_path_factory.mktemp("slurm-early"), cluster, two=RECIPE)


def ended(place: Place, runs: str, stage: str = "long") -> None:
    """Until no job of a stage is left in the queue."""
    place.cluster.wait(place.job(runs, stage))


def test_a_job_that_fails_before_its_stage_begins_is_a_failure_with_the_queues_word(place: Place) -> None:
    """A script that goes on while the exit code is 75 would send such a job for ever."""
    wrong = 'launcher.environment=["echo no such module","exit 7"]'
    said = place.cpt("run", "recipe=two", "runs=env", "name=it", *ON_SLURM, wrong, "--wait", code=1)
    job = place.job("env", "long")
    why = f"job {job} ended: FAILED (exit code 7) before the stage began; it printed last: no such module"
    assert f"stage `long` failed: {why}; `launcher.environment` runs first" in said
    status = place.cpt("status", "env/it")
    assert f"long: {why}" in status and status.count(f"job {job}") == 1
    assert "short: left the queue because stage `long` failed" in status
    assert place.state("env", "long").status == state.FAILED
    assert "no such module" in place.cpt("logs", "env/it")


def test_status_says_so_though_nobody_waited_and_the_job_printed_nothing(place: Place) -> None:
    place.send("silent", 'launcher.environment=["exit 7"]')
    ended(place, "silent")
    status = place.cpt("status", "silent/it")
    assert "(exit code 7) before the stage began; it printed nothing; `launcher.environment` runs first" in status
    assert re.search(r"^long +failed ", status, re.MULTILINE)


def test_a_job_that_slurm_has_forgotten_is_said_to_be_gone_and_does_not_end_with_75(
    place: Place, clusters: Callable[..., Cluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm without accounts forgets a job a few seconds after its end here."""
    young = Place(place.folder, clusters("forgetful", "--set", "MinJobAge=2"))
    young.send("forgotten", 'launcher.environment=["echo no such module","exit 7"]')
    job = young.job("forgotten", "long")
    young.wait(lambda: young.cluster.state(job) == "", "the queue forgets the job")
    status = young.cpt("status", "forgotten/it")
    assert (
        f"long: job {job} left the queue before the stage began, and how it ended cannot be told: the queue" in status
    )
    assert "it printed last: no such module" in status
    monkeypatch.setenv("SLURM_CONF", young.cluster.environ["SLURM_CONF"])
    run_dir = young.run_dir("forgotten")
    error = send.wait_for_jobs(run_dir, read_plan(run_dir), print)
    assert error is not None and error.exit_code == FAILED and "cannot be told" in error.message


def test_a_job_that_was_cancelled_before_its_stage_began_has_not_failed(place: Place) -> None:
    place.send("taken", "launcher.extra.begin=now+1hour")
    place.cpt("cancel", "taken/it", "--wait")
    assert "failed" not in place.cpt("status", "taken/it")


@pytest.mark.parametrize(
    ("runs", "command", "told"),
    [
        ("missing", "launcher.python=/none/python", "/none/python: No such file or directory"),
        ("locked", "launcher.wrap_command=[{folder}/recipes/two.yaml]", "{folder}/recipes/two.yaml: Permission denied"),
        ("shell", "launcher.wrap_command=[sh,-c,'no-such-wrapper \"$@\"','-']", "no-such-wrapper: not found"),
    ],
    ids=["missing", "not-executable", "in-a-shell"],
)
def test_ranks_whose_command_cannot_be_executed_are_not_tried_again(
    place: Place, runs: str, command: str, told: str
) -> None:
    place.send(runs, command.format(folder=place.folder))
    place.wait(lambda: place.state(runs, "long").status == state.FAILED, "the stage fails")
    assert place.cluster.wait(place.job(runs, "long")) == "FAILED", "not queued again"
    status = place.cpt("status", f"{runs}/it")
    assert "what starts the ranks cannot be executed: " in status and told.format(folder=place.folder) in status
    failure = read_json(place.run_dir(runs) / "stages" / "long" / "attempt_1" / "failure.json")
    assert "`launcher.python` and `launcher.wrap_command`" in failure["hints"][0]
    assert place.state(runs, "long").attempt == 1


def test_nothing_is_sent_while_a_job_that_was_sent_by_hand_has_a_stage(place: Place) -> None:
    place.send("hand")
    place.cpt("cancel", "hand/it", "--now", "--wait")
    script = place.run_dir("hand") / "stages" / "long" / "job.sbatch"
    by_hand = place.cluster.run("sbatch", "--parsable", "--begin=now+1hour", script)
    sent = place.jobs("hand")
    assert f"has jobs in the queue: {by_hand} (`long`, sent by hand)" in place.send("hand", code=2)
    assert place.jobs("hand") == sent
    assert f"removed from the queue: {by_hand}" in place.cpt("cancel", "hand/it")


def test_a_node_that_was_lost_is_named(place: Place) -> None:
    """Two nodes of a rank each: first the one without the script, then, on one node, the one with it."""
    place.send("both", "launcher.ranks_per_node=1")
    place.wait_step("both", "long", step=2)
    place.cluster.crash("node2")
    place.wait(lambda: place.state("both", "long").status == state.FAILED, "the attempt ends")
    place.wait(lambda: place.cluster.state(place.job("both", "long")) == "PENDING", "the job waits")
    assert "long: `node2` was lost" in place.cpt("status", "both/it")


def test_the_node_of_a_script_that_was_lost_is_named(place: Place) -> None:
    place.send("one")
    place.wait_step("one", "long", step=2)
    job = place.job("one", "long")
    node = place.cluster.run("squeue", "-h", "-j", job, "-o", "%N")
    place.cluster.crash(node)
    place.cluster.wait(job, "PENDING")
    status = place.cpt("status", "one/it")
    assert "queued" in status and "worked on by" not in status
    place.cluster.start_now(job)
    place.wait(lambda: place.state("one", "long").attempt == 2, "the job goes on")
    assert f"long: attempt 1 ended: `{node}` was lost" in place.cpt("status", "one/it")


def test_a_deleted_run_is_not_made_again_by_its_jobs_and_its_jobs_can_be_cancelled(place: Place) -> None:
    place.send("deleted")
    place.wait_step("deleted", "long", step=2)
    jobs = place.jobs("deleted")
    while place.run_dir("deleted").exists():  # ranks write into it meanwhile
        shutil.rmtree(place.run_dir("deleted"), ignore_errors=True)
    said = place.cpt("cancel", "deleted/it")
    # The one that runs may have ended by itself: its folder is gone.
    assert re.search(rf"removed from the queue: {jobs['short'][0]}(, {jobs['long'][0]})?\n", said), said
    assert "is gone" in said
    place.cluster.clear()  # waits for the processes, too
    left = [path for path in Path(place.run_dir("deleted")).rglob("*") if path.is_file()]
    assert left == []
    place.send("deleted")
