"""Ranks that nobody told where to meet find each other by a file."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from cpt.base.errors import EnvironmentProblem
from cpt.base.files import read_json, write_json
from cpt.launch import outcome, rendezvous
from cpt.launch.rendezvous import meet, own_address


def ranks(rank: int, size: int = 2, here: int = 1) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(here)}


def test_whoever_says_where_to_meet_wins(tmp_path: Path) -> None:
    environ = {**ranks(1), "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    before = dict(environ)
    meet(tmp_path, environ)
    assert environ == before and not list(tmp_path.iterdir())


def test_a_single_rank_meets_nobody(tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    meet(tmp_path, environ)
    assert environ == {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"} and not list(tmp_path.iterdir())


def _sum(attempt: Path, rank: int, told: str) -> None:
    import torch
    import torch.distributed as dist

    environ = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    os.environ.clear()
    os.environ.update({**environ, **ranks(rank, 3, here=3)})
    meet(attempt, os.environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo")
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    Path(told).write_text(str(value.item()))
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_of_one_machine_meet_whoever_is_first(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started = []
    for rank in (2, 1, 0):  # rank 0 last
        started.append(context.Process(target=_sum, args=(tmp_path, rank, str(tmp_path / f"told{rank}"))))
        started[-1].start()
    for process in started:
        process.join(120)
        assert process.exitcode == 0
    assert {(tmp_path / f"told{rank}").read_text() for rank in range(3)} == {"6.0"}
    assert read_json(tmp_path / rendezvous.NAME)["host"] == "127.0.0.1"


def test_a_rank_0_that_does_not_come_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        EnvironmentProblem, match=r"rank 1: rank 0 has not said .*rendezvous\.json` is missing"
    ) as caught:
        meet(tmp_path, ranks(1, here=2), wait_s=0.3)
    assert any("rank_0000.log" in hint for hint in caught.value.hints)


def test_a_rank_0_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    threading.Timer(0.3, outcome.write_record, (tmp_path, 0, 1, {"error": "no tokenizer"})).start()
    began = time.monotonic()
    with pytest.raises(EnvironmentProblem, match="rank 0 ended before the ranks met"):
        meet(tmp_path, ranks(1, here=2), wait_s=60)
    assert time.monotonic() - began < 30


def test_an_address_that_nobody_answers_at_is_named(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_json(tmp_path / rendezvous.NAME, {"host": "127.0.0.1", "port": port})
    with pytest.raises(EnvironmentProblem, match=rf"does not reach rank 0 at 127\.0\.0\.1:{port}") as caught:
        meet(tmp_path, ranks(1, here=2), connect_s=0)
    assert any("launcher.interface" in hint for hint in caught.value.hints)


CARDS = {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"], "eno1": ["10.0.0.7"], "ib0": ["10.1.0.7"], "ib1": []}


def never() -> str:
    raise OSError("no such name")


def test_the_interface_of_the_profile_is_taken_by_name_or_beginning() -> None:
    assert own_address(["ib"], CARDS, never) == ("10.1.0.7", "ib0")
    assert own_address(["bond", "eno1"], CARDS, never) == ("10.0.0.7", "eno1")
    assert own_address(["ib1", "ib"], CARDS, never) == ("10.1.0.7", "ib0")
    assert own_address(["eth0"], {"eth00": ["1.1.1.1"], "eth0": ["2.2.2.2"]}, never) == ("2.2.2.2", "eth0")
    with pytest.raises(EnvironmentProblem) as caught:
        own_address(["hsn"], CARDS, never)
    assert "has no network interface that begins with `hsn` (`launcher.interface`), only " in caught.value.message
    assert "`eno1`" in caught.value.message and "`launcher.interface=[...]`" in caught.value.hints[0]


def test_without_a_profile_the_hosts_name_is_taken_unless_it_leads_to_itself() -> None:
    assert own_address((), CARDS, lambda: "10.0.0.7") == ("10.0.0.7", None)
    assert own_address((), CARDS, lambda: "127.0.0.11") == ("127.0.0.11", None)  # nodes that share a machine
    for own in ("127.0.1.1", "127.0.0.1"):
        assert own_address((), CARDS, lambda own=own: own) == ("10.0.0.7", "eno1")
    assert own_address((), CARDS, never) == ("10.0.0.7", "eno1")
    with pytest.raises(EnvironmentProblem, match="no address"):
        own_address((), {"lo": ["127.0.0.1"], "docker0": ["172.17.0.1"]}, never)


def test_gloo_is_told_the_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_addresses", lambda: {"ib0": ["127.0.0.1"]})
    environ = ranks(0)
    meet(tmp_path, environ, ["ib"])
    found = read_json(tmp_path / rendezvous.NAME)
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == (found["host"], str(found["port"]))
    other = {**ranks(1), "GLOO_SOCKET_IFNAME": "mine"}
    meet(tmp_path, other, ["ib"])
    assert other["GLOO_SOCKET_IFNAME"] == "mine" and other["MASTER_PORT"] == environ["MASTER_PORT"]
