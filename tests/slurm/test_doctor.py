"""`cpt doctor launcher=...` on a real Slurm."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.config.launcher import launcher
from cpt.doctor import check, scheduler
from cpt.doctor.check import Check
from cpt.launch.slurm.commands import Commands
from tests.slurm.conftest import Cluster

PROFILE = "name: slurm\npartition: main\ntime: 30m\nnodes: 2\nranks_per_node: 2\ncpus_per_rank: 1\nmem: 500M\n"


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., dict[str, Check]]:
    """The checks of a cluster's file by name, as `cpt doctor launcher=mine ...` makes them."""
    (tmp_path / "conf" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "launcher" / "mine.yaml").write_text(PROFILE)

    def found(cluster: Cluster, *words: str) -> dict[str, Check]:
        name, made = launcher(["launcher=mine", *words], tmp_path)
        commands = Commands(environ=cluster.environ, cwd=tmp_path)
        return {c.name: c for c in check.run(scheduler.checks(name, made, tmp_path / "runs", tmp_path, commands))}

    return found


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, c in found.items() if c.status == "fail"]


def test_a_good_launcher_passes_and_nothing_is_submitted(
    ask: Callable[..., dict[str, Check]], cluster: Cluster
) -> None:
    before = cluster.run("squeue", "-h", "-t", "all", "-o", "%i")
    start = time.monotonic()
    found = ask(cluster)
    assert time.monotonic() - start < 20
    assert failed(found) == []
    assert [n for n, c in found.items() if c.status == "warn"] in ([], ["shared files"])
    assert found["slurm"].found.startswith("Slurm ")
    assert found["partition"].found == "`main`: no time limit, a job asks for 30 min"
    assert found["nodes"].found == "2 of 2 have 2 CPUs, 500M memory for 2 ranks; 2 idle"
    assert found["submission"].found == "Slurm would take a job of 2 nodes of 2 ranks, now, on node[1-2]"
    assert "leaves them 5 s" in found["stops"].found
    assert found["arrays"].found == "at most 1,000 proxies of a law"
    assert found["clock"].found.startswith("that of the controller")
    assert cluster.run("squeue", "-h", "-t", "all", "-o", "%i") == before


@pytest.mark.parametrize(
    ("words", "names", "says"),
    [
        (["launcher.partition=shrt"], ["partition"], "did you mean `launcher.partition=short`?"),
        (["launcher.partition=short"], ["partition"], "`short` allows at most 2 min, `launcher.time` is 30 min"),
        (
            ["launcher.nodes=3"],
            ["nodes", "submission"],
            "2 of 2 have 2 CPUs, 500M memory for 2 ranks; a job",
        ),
        (["launcher.cpus_per_rank=3"], ["nodes", "submission"], "0 of 2 have 6 CPUs"),
        (["launcher.mem=64G"], ["nodes", "submission"], "0 of 2 have 2 CPUs, 64G memory"),
        (["launcher.gpus=gres"], ["nodes", "submission"], "2 GPUs"),
        (["launcher.constraint=fast"], ["submission"], "Invalid feature specification"),
        (["launcher.container=/images/x.sqsh"], ["container"], "no pyxis here"),
        (["launcher.template=missing.j2"], ["submission"], "there is no file"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_cluster_would_not_take_fails(
    ask: Callable[..., dict[str, Check]], cluster: Cluster, words: list[str], names: list[str], says: str
) -> None:
    found = ask(cluster, *words)
    assert failed(found) == names
    assert any(says in f"{c.found} {c.hint}" for c in found.values()), found


def test_what_works_with_losses_is_a_warning(ask: Callable[..., dict[str, Check]], cluster: Cluster) -> None:
    spot = ask(cluster, "launcher.partition=spot")["stops"]
    assert spot.status == "warn" and "a preempted job (REQUEUE) has 5 s" in spot.found
    short = ask(cluster, "launcher.time=2m", "launcher.warn=30")["stops"]
    assert short.status == "warn" and "little of 2 min for work" in short.found
    once = ask(cluster, "launcher.requeue=false")["requeue"]
    assert once.status == "warn" and "`launcher.requeue=true`" in once.hint
    again = ask(cluster, "launcher.requeue=false", "launcher.successors=2")["requeue"]
    assert again.status == "ok" and "2 successors" in again.found
    account = ask(cluster, "launcher.account=research")["account"]
    assert account.status == "warn" and "keeps no accounts" in account.found


def test_a_command_that_is_not_on_this_machine_is_a_warning_as_nodes_may_have_it(
    ask: Callable[..., dict[str, Check]], cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "locked").write_text("#!/bin/sh\n")
    assert "command" not in ask(cluster), "the interpreter that asks is there"
    for words, says in (
        ("launcher.python=/none/python", "`launcher.python`: `/none/python` is not there on this machine"),
        ("launcher.wrap_command=[no-such-wrapper,exec]", "`launcher.wrap_command`: `no-such-wrapper` is not there"),
        (f"launcher.wrap_command=[{tmp_path}/locked]", f"`{tmp_path}/locked` cannot be executed on this machine"),
    ):
        found = ask(cluster, words)
        assert failed(found) == [] and found["command"].status == "warn" and says in found["command"].found
    assert ask(cluster, "launcher.wrap_command=[env,-i]")["command"].status == "ok"


def test_a_node_that_is_down_is_a_warning(ask: Callable[..., dict[str, Check]], cluster: Cluster) -> None:
    cluster.crash("node2", tell=True)
    try:
        found = ask(cluster)["nodes"]
    finally:
        cluster.up("node2")
    assert found.status == "warn" and "1 up where a job may take 2" in found.found


def test_pretended_gpus_are_counted(ask: Callable[..., dict[str, Check]], clusters: Callable[..., Cluster]) -> None:
    gpus = clusters("doctor-gpus", "--gpus", "2", "--nodes", "1")
    unused = ask(gpus, "launcher.nodes=1")["nodes"]
    assert unused.status == "warn" and "they have 2 GPUs, and jobs ask for none" in unused.found
    assert failed(ask(gpus, "launcher.nodes=1", "launcher.gpus=per_node")) == []
    more = ask(gpus, "launcher.nodes=1", "launcher.gpus=per_node", "launcher.ranks_per_node=3")
    assert failed(more) == ["nodes", "submission"]


def test_an_absent_controller_is_named_once_and_soon(
    ask: Callable[..., dict[str, Check]], clusters: Callable[..., Cluster]
) -> None:
    away = clusters("doctor-away")
    away.kill_controller()
    try:
        start = time.monotonic()
        found = ask(away)
        assert time.monotonic() - start < scheduler.ALL_SECONDS
    finally:
        away.start()
    assert failed(found) == ["controller"] and list(found) == ["slurm", "controller"]


def test_accounts_are_checked_where_they_are_kept(
    ask: Callable[..., dict[str, Check]], clusters: Callable[..., Cluster]
) -> None:
    books = clusters("doctor-books", "--accounting", "--set", "AccountingStorageEnforce=associations,limits,qos")
    assert failed(ask(books, "launcher.account=research")) == []
    wrong = ask(books, "launcher.account=nobody")
    assert failed(wrong) == ["account", "submission"]
    assert "may not use account `nobody`" in wrong["account"].found and "research" in wrong["account"].hint
    wrong = ask(books, "launcher.account=research", "launcher.qos=gold")
    assert failed(wrong) == ["account", "submission"] and "may not use the qos `gold`" in wrong["account"].found
