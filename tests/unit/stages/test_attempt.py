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


def test_attempts_that_never_began_and_those_of_an_earlier_command_do_not_count(tmp_path: Path) -> None:
    for number, resume in ((1, None), (2, "checkpoints/iter_0000012"), (4, "checkpoints/iter_0000012")):
        write_json(tmp_path / f"attempt_{number}" / "job.json", {"resume": resume})
    (tmp_path / "attempt_3").mkdir()  # killed before its job was written
    assert attempt._began_at(tmp_path) == [0, 12, 12]
    assert attempt._began_at(tmp_path, first=3) == [12]
