"""What a cluster's file says, on a real cluster: lines of shell that fail, and a recipe's largest job."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt.launch.slurm.options import Slurm
from tests.slurm.conftest import Cluster
from tests.slurm.test_script import Stage, real

__all__ = ["real"]


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
