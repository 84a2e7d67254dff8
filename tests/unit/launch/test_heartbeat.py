"""Signs of life on disk."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from cpt.base import pulse
from cpt.launch import heartbeat
from cpt.launch.heartbeat import Heartbeat


def test_a_rank_writes_what_it_does_and_says_when_it_has_ended(tmp_path: Path) -> None:
    pulse.current.say(pulse.STEP, 12)
    pulse.current.tick()
    alive = Heartbeat(tmp_path, 3, 4, hang_after=0.4)
    alive.start()
    first = heartbeat.read_beats(tmp_path, 4)
    assert list(first) == [3]
    assert (first[3].pid, first[3].doing, first[3].step, first[3].count) == (os.getpid(), "step", 12, 1)
    assert abs(first[3].moved - time.time()) < 5
    deadline = time.monotonic() + 60
    while heartbeat.read_beats(tmp_path, 4)[3].t == first[3].t and time.monotonic() < deadline:
        time.sleep(0.02)
    again = heartbeat.read_beats(tmp_path, 4)[3]
    assert again.t > first[3].t and abs(again.moved - first[3].moved) < 0.01
    alive.stop()
    assert heartbeat.read_beats(tmp_path, 4)[3].doing == "end"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heartbeats"], "stacks are kept only of what hung"


def test_a_rank_on_a_broken_file_system_works_on(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").write_text("a file where a folder should be")
    alive = Heartbeat(tmp_path, 0)
    alive.start()
    alive.stop()
    assert heartbeat.read_beats(tmp_path, 1) == {}


def test_a_half_written_sign_of_life_is_none(tmp_path: Path) -> None:
    path = heartbeat.beat_path(tmp_path, 0)
    path.parent.mkdir()
    path.write_text('{"rank": 0, "pi')
    assert heartbeat.read_beats(tmp_path, 2) == {}
    path.write_text(json.dumps({"rank": 0}))
    assert heartbeat.read_beats(tmp_path, 2) == {}


def test_a_hang_is_looked_for_as_told_and_rarely_by_many_ranks() -> None:
    assert heartbeat.hang_after({}) == 1800.0
    assert heartbeat.hang_after({"CPT_HANG_AFTER": "0"}) == 0.0
    assert heartbeat.hang_after({"CPT_HANG_AFTER": "soon"}) == 1800.0
    assert heartbeat.beat_seconds(1800, 8) == 5 and heartbeat.beat_seconds(8, 8) == 2
    assert heartbeat.beat_seconds(1800, 2000) == 40
    assert heartbeat.collective_seconds(1800) > 1800 and heartbeat.collective_seconds(0) == 600


def test_where_time_goes_is_renewed_every_twenty_steps() -> None:
    one = pulse.Pulse()
    for _ in range(19):
        one.spent(data_s=0.2, own_s=0.5, step_s=1.0)
    assert (one.own_s, one.data_share) == (0.0, 0.0)
    one.spent(data_s=0.2, own_s=0.5, step_s=1.0)
    assert abs(one.own_s - 0.5) < 1e-9 and abs(one.data_share - 0.2) < 1e-9
