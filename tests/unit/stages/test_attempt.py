"""What an attempt does besides starting ranks: its sign of life, and attempts that never began."""

from __future__ import annotations

import os
from pathlib import Path

from cpt.base import lock
from cpt.base.files import write_json
from cpt.stages import attempt


def test_the_pulse_beats_its_own_lock_alone(tmp_path: Path) -> None:
    folder = tmp_path / "stages" / "only"
    held, _ = lock.take(folder, lock.holder_of(os.getpid(), "one"))
    job = folder / "attempt_1" / "job.json"
    write_json(job, {"fence": held.holder.token})
    tick = attempt.pulse(job)
    os.utime(held.path, (1, 1))
    assert tick() is False and held.path.stat().st_mtime > 1
    held.release()
    other, _ = lock.take(folder, lock.holder_of(os.getpid(), "another"))
    os.utime(other.path, (1, 1))
    (tmp_path / attempt.STOP_FILE).touch()
    assert tick() is True and other.path.stat().st_mtime == 1


def test_an_attempt_killed_before_its_job_was_written_counts_for_nothing(tmp_path: Path) -> None:
    assert attempt._began_at(tmp_path) is None
    write_json(tmp_path / "job.json", {"resume": "checkpoints/iter_0000012"})
    assert attempt._began_at(tmp_path) == 12
