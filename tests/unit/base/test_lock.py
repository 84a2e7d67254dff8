"""Who holds a run: the living keep their lock, the dead lose it, and two never hold it at once."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cpt.base import lock
from cpt.base.errors import Fenced, UsageError
from cpt.base.files import write_json


def me(what: str = "cpt run recipe=demo") -> lock.Holder:
    return lock.holder_of(os.getpid(), what)


def dead() -> lock.Holder:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    held = lock.holder_of(child.pid, "cpt run of old")
    child.wait()
    return held


def test_a_second_taker_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    held, before = lock.take(tmp_path, me())
    assert before is None
    with pytest.raises(UsageError) as error:
        lock.take(tmp_path, me("other"))
    assert str(os.getpid()) in error.value.message
    assert "cpt run recipe=demo" in error.value.message
    assert error.value.exit_code == 2
    held.release()
    lock.take(tmp_path, me("other"))


def test_the_lock_of_a_dead_process_is_taken_over_and_it_is_named(tmp_path: Path) -> None:
    old = dead()
    write_json(tmp_path / lock.NAME, dataclasses.asdict(old))
    held, before = lock.take(tmp_path, me())
    assert before is not None and before.pid == old.pid
    assert held.is_ours()


def test_a_pid_that_was_given_to_another_process_holds_nothing(tmp_path: Path) -> None:
    start = lock.start_time(os.getpid())
    assert start is not None
    recycled = dataclasses.replace(me(), start=start - 1)
    write_json(tmp_path / lock.NAME, dataclasses.asdict(recycled))
    assert lock.live_holder(tmp_path) is None


def test_a_holder_on_another_machine_lives_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    far = dataclasses.replace(me(), machine="another boot", host="node7")
    write_json(tmp_path / lock.NAME, dataclasses.asdict(far))
    with pytest.raises(UsageError, match="node7"):
        lock.take(tmp_path, me())
    silent_since = time.time() - lock.STALE_SECONDS - 5
    os.utime(tmp_path / lock.NAME, (silent_since, silent_since))
    _, before = lock.take(tmp_path, me())
    assert before is not None and before.host == "node7"


def test_a_beat_keeps_it_alive(tmp_path: Path) -> None:
    far = dataclasses.replace(me(), machine="another boot")
    write_json(tmp_path / lock.NAME, dataclasses.asdict(far))
    os.utime(tmp_path / lock.NAME, (1, 1))
    assert lock.live_holder(tmp_path) is None
    lock.beat(tmp_path / lock.NAME)
    assert lock.live_holder(tmp_path) is not None


def test_who_lost_its_lock_does_not_release_the_new_holders(tmp_path: Path) -> None:
    write_json(tmp_path / lock.NAME, dataclasses.asdict(dead()))
    slept = lock.Lock(tmp_path, dead())
    held, _ = lock.take(tmp_path, me())
    slept.release()
    assert held.is_ours()


def test_of_many_takers_of_a_stale_lock_one_wins(tmp_path: Path) -> None:
    write_json(tmp_path / lock.NAME, dataclasses.asdict(dead()))

    def attempt(number: int) -> bool:
        try:
            lock.take(tmp_path, me(f"taker {number}"))
        except UsageError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


def test_a_damaged_lock_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / lock.NAME).write_text("{")
    assert lock.live_holder(tmp_path) is None
    assert lock.take(tmp_path, me())[0].is_ours()


def elsewhere(job: str | None, since: float = 0.0) -> lock.Holder:
    """A holder on another machine."""
    return dataclasses.replace(me(), machine="another boot", host="node7", job=job, since=since)


def test_a_job_that_was_requeued_takes_its_own_lock_over_at_once(tmp_path: Path) -> None:
    write_json(tmp_path / lock.NAME, dataclasses.asdict(elsewhere("41")))
    with pytest.raises(UsageError, match=r"`node7` \(job 41\)"):
        lock.take(tmp_path, lock.holder_of(os.getpid(), "script", job="42"))
    held, before = lock.take(tmp_path, lock.holder_of(os.getpid(), "script", job="41"))
    assert before is not None and before.host == "node7" and held.is_ours()


def test_a_job_that_started_earlier_takes_nothing_from_its_later_start(tmp_path: Path) -> None:
    write_json(tmp_path / lock.NAME, dataclasses.asdict(elsewhere("41", since=time.time() + 50)))
    with pytest.raises(UsageError):
        lock.take(tmp_path, lock.holder_of(os.getpid(), "script", job="41"))


def test_a_queue_is_asked_whether_the_job_of_a_holder_is_gone(tmp_path: Path) -> None:
    write_json(tmp_path / lock.NAME, dataclasses.asdict(elsewhere("41")))
    asked = []

    def is_gone(held: lock.Holder) -> bool:
        asked.append(held.job)
        return len(asked) > 1

    with pytest.raises(UsageError):
        lock.take(tmp_path, me(), is_gone=is_gone)
    assert lock.take(tmp_path, me(), is_gone=is_gone)[0].is_ours()
    assert asked == ["41", "41"]
    with pytest.raises(UsageError):  # a living process of this machine is no question
        lock.take(tmp_path, me("other"), is_gone=lambda held: True)


def test_lock_files_of_older_and_newer_releases_are_read(tmp_path: Path) -> None:
    value = dataclasses.asdict(me())
    del value["job"]
    write_json(tmp_path / lock.NAME, {**value, "colour": "green"})
    held = lock.live_holder(tmp_path)
    assert held is not None and held.job is None


def test_a_fence_closes_when_the_lock_is_taken_over_or_gone(tmp_path: Path) -> None:
    (tmp_path / "domain").mkdir()
    held, _ = lock.take(tmp_path / "domain", me())
    fence = lock.Fence(tmp_path / "domain", held.holder.token)
    fence.check()
    os.utime(held.path, (1, 1))
    fence.beat()
    assert held.path.stat().st_mtime > 1
    held.release()
    with pytest.raises(Fenced, match="another attempt has taken over `domain`; this one publishes nothing"):
        fence.check()
    lock.take(tmp_path / "domain", me("other"))
    with pytest.raises(Fenced):
        fence.check()
    os.utime(held.path, (1, 1))
    fence.beat()
    assert held.path.stat().st_mtime == 1, "the sign of life of one that lost the lock counts for nobody"
