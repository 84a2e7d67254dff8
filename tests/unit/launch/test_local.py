"""The script that does by hand what the local launcher does."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.launch import LAUNCHERS, Launch
from cpt.launch.local import Local


def launch(run_dir: Path, stage: str = "domain") -> Launch:
    return Launch(
        run_dir=run_dir,
        stage=stage,
        attempt_dir=run_dir / "stages" / stage / "attempt_1",
        world_size=4,
        layout="tp 2, pp 2, dp 1",
        python="/opt/my env/bin/python",
        cwd=run_dir,
    )


def test_the_script_is_complete_executable_bash(tmp_path: Path) -> None:
    path = Local().write_script(launch(tmp_path))
    text = path.read_text()
    assert path.stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    assert "'/opt/my env/bin/python' -m cpt.worker --ranks 4" in text
    assert "export OMP_NUM_THREADS=" in text
    assert "tp 2, pp 2, dp 1" in text


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    folder = tmp_path / "a'; touch pwned #\n$(touch pwned)"
    folder.mkdir()
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a" >> "' + str(tmp_path) + '/seen"; done\n')
    python.chmod(0o755)
    script = Local().write_script(Launch(**(vars(launch(folder)) | {"python": str(python)})))
    subprocess.run(["bash", str(script)], check=False, cwd=tmp_path)
    assert not list(tmp_path.rglob("pwned"))
    assert str(folder) in (tmp_path / "seen").read_text().split("\0")


def test_options_refuse_nonsense() -> None:
    for bad in (0, -1, True, 1.5):
        with pytest.raises(UsageError, match=r"launcher\.devices"):
            Local(devices=bad)  # type: ignore[arg-type]
    assert LAUNCHERS.get("local") is Local
    assert Local(devices=8).num_devices() == 8


def test_the_time_after_which_a_stage_hangs_reaches_the_ranks(tmp_path: Path) -> None:
    assert "export CPT_HANG_AFTER=1800\n" in Local().write_script(launch(tmp_path)).read_text()
    assert "export CPT_HANG_AFTER=90\n" in Local(hang_after="90s").write_script(launch(tmp_path)).read_text()
    assert "export CPT_HANG_AFTER=0\n" in Local(hang_after=0).write_script(launch(tmp_path)).read_text()
    with pytest.raises(UsageError, match=r"`launcher\.hang_after`: `soon` is not a length of time"):
        Local(hang_after="soon")


def test_names_are_quoted_as_the_shell_reads_them(tmp_path: Path) -> None:
    text = Local().write_script(launch(tmp_path, "my-stage")).read_text()
    line = next(line for line in text.splitlines() if "attempt begin" in line)
    inner = line.removeprefix("job=$(").rpartition(")")[0]
    assert shlex.split(inner)[3:6] == ["begin", str(tmp_path), "my-stage"]
