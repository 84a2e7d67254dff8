"""wandb beside the stages of a Slurm run: offline into the run folder, and online without a network behind it."""

from __future__ import annotations

import importlib
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpt.base.files import read_json
from cpt.stages import state
from tests.dist import killing
from tests.slurm.conftest import Cluster
from tests.slurm.test_runs import TRAIN, Place

CLOSE_SECONDS = 20  # the longest that the end of a job waits for wandb
RECIPE = f"""{killing.TINY}{TRAIN}
stages:
  first:
    from: base
    tokens: 15360
    mixture: {{even: 0.7, odd: 0.3}}
    lr: {{schedule: rewarm, peak: 1e-3, warmup: 4}}
  second:
    from: first
    keep: [weights, optimizer, cursor, lr, rng]
    tokens: 2560
    mixture: {{even: 0.2, odd: 0.8}}
"""
FIRST, SECOND = 60, 10  # steps


@pytest.fixture
def place(tmp_path: Path, cluster: Cluster) -> Place:
    pytest.importorskip("wandb")
    return Place(tmp_path, cluster, two=RECIPE)


def records(data: bytes) -> Iterator[bytes]:
    """What a file of wandb's holds: LevelDB's log format behind seven bytes of its own; a torn end is left out."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little of a block for a head
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        at += 7 + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4) and len(part) == length:
            yield whole


def told(run_dir: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """The ids of all runs that wandb wrote offline, and what they were told, in order."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    ids, rows = set(), []
    for path in sorted((run_dir / "wandb" / "wandb").glob("offline-run-*/*.wandb")):
        for data in records(path.read_bytes()):
            record = messages.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return ids, rows


def steps(rows: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["stage"], row["stage_step"]) for row in rows if "train/lr" in row]


def test_a_chain_with_a_requeue_is_one_run_to_which_every_step_is_told_once(place: Place) -> None:
    place.send("offline", "tracking.wandb=offline")
    run_dir = place.run_dir("offline")
    assert not (run_dir / "wandb").exists(), "jobs tell wandb themselves, not the command that sends them"
    job = place.job("offline", "first")
    place.wait_step("offline", "first", step=12)
    place.wait(lambda: bool(steps(told(run_dir)[1])), "steps at wandb while the stage runs", 60)
    assert place.state("offline", "first").status == state.RUNNING
    place.cluster.run("scancel", "--signal=USR2", job)
    place.wait(lambda: place.state("offline", "first").status == state.SAVED, "saved", 60)
    place.cluster.start_now(job)
    place.wait_done("offline", "first", "second")
    last = place.job("offline", "second")
    place.cluster.wait(last, "COMPLETED", 60)
    ids, rows = told(run_dir)
    assert place.state("offline", "first").attempt == 2
    assert ids == {read_json(run_dir / "wandb" / "sent.json")["id"]}
    wanted = [("first", n) for n in range(1, FIRST + 1)] + [("second", n) for n in range(1, SECOND + 1)]
    assert sorted(steps(rows)) == wanted
    losses = [row for row in rows if "valid/loss/even" in row]
    assert {row["stage"] for row in losses} == {"first", "second"}
    assert max(row["tokens"] for row in rows) == 15360 + 2560
    status = place.cpt("status", "offline/it")
    assert "wandb failed" not in status and "wandb is offline: `cpt sync it` sends what was written" in status
    again = place.send("offline", "tracking.wandb=offline", "--wait")
    assert "wandb   `cpt sync offline/it` sends what was written offline" in again


def test_a_network_that_never_answers_delays_and_fails_nothing(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        variables = f"{{WANDB_BASE_URL: '{url}', WANDB_API_KEY: '{40 * 'a'}'}}"
        place.send("away", "tracking.wandb=online", f"launcher.variables={variables}")
        place.wait_done("away", "first")
        place.cluster.wait(place.job("away", "first"), "COMPLETED", CLOSE_SECONDS + 60)
        place.wait_done("away", "second")
        place.cluster.wait(place.job("away", "second"), "COMPLETED", CLOSE_SECONDS + 20)
    (log,) = (place.run_dir("away") / "stages" / "first" / "logs").glob("*.log")
    said = "wandb failed: it did not finish within 20 s; the run does not depend on it, `cpt sync` sends it later"
    assert f"warning: {said}" in log.read_text()
    assert said.replace("`cpt sync`", "`cpt sync it`") in place.cpt("status", "away/it")
