"""What `cpt doctor` makes of Slurm's words, and where there is no Slurm."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cpt.base.errors import CptError
from cpt.cli import main
from cpt.config.launcher import launcher
from cpt.doctor import check, scheduler
from cpt.launch.local import Local
from cpt.launch.slurm.commands import Commands
from cpt.launch.slurm.options import Slurm


def test_a_promised_start_in_a_far_year_is_not_repeated() -> None:
    now = time.mktime(time.strptime("2026-03-01T12:00:00", "%Y-%m-%dT%H:%M:%S"))
    said = "Job 12 to start at {} using 4 processors on nodes node[1-2] in partition main"
    assert scheduler.promised(said.format("2026-03-01T12:00:01"), now) == ", now, on node[1-2]"
    assert "at most 2.0 h" in scheduler.promised(said.format("2026-03-01T14:00:00"), now)
    for far in ("6109-03-01T12:00:00", "2028-03-01T12:00:00", "99999-03-01T12:00:00"):
        assert scheduler.promised(said.format(far), now) == ", when is not known"
    assert scheduler.promised("something else", now) == ""


def test_without_slurm_one_check_fails(tmp_path: Path) -> None:
    commands = Commands(environ={"PATH": str(tmp_path)}, cwd=tmp_path)
    found = check.run(scheduler.checks("slurm", Slurm(), tmp_path, tmp_path, commands))
    assert [(c.status, c.name) for c in found] == [("fail", "slurm")]
    assert "sbatch" in found[0].found and "login node" in found[0].hint


def test_a_controller_that_hangs_costs_a_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ONE_SECONDS", 0.5)
    for name in scheduler.COMMANDS:
        (tmp_path / name).write_text(
            "#!/bin/sh\ncase $1 in --version) echo slurm 24.11.1;; *) exec /bin/sleep 60;; esac\n"
        )
        (tmp_path / name).chmod(0o755)
    start = time.monotonic()
    monkeypatch.setenv("PATH", f"{tmp_path}")
    found = check.run(scheduler.checks("slurm", Slurm(), tmp_path, tmp_path, Commands(cwd=tmp_path)))
    assert [(c.status, c.name) for c in found] == [("ok", "slurm"), ("fail", "controller")]
    assert "24.11.1" in found[0].found and "tried with 22.05" in found[0].found
    assert time.monotonic() - start < 20


def test_a_local_launcher_says_its_devices(tmp_path: Path) -> None:
    (found,) = check.run(scheduler.checks("local", Local(devices=3), tmp_path, tmp_path))
    assert (found.status, found.found) == ("ok", "`local`: 3 devices, which `parallel.dp` fills")


def test_a_launcher_is_read_without_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "conf" / "launcher").mkdir(parents=True)
    (tmp_path / "conf" / "launcher" / "mine.yaml").write_text("name: slurm\ntime: 4h\nranks_per_node: 8\n")
    name, made = launcher(["launcher=mine", "launcher.nodes=2", "launcher.environment=[module load cuda]"], tmp_path)
    assert name == "slurm" and isinstance(made, Slurm)
    assert (made.time, made.num_devices(), made.environment) == ("4h", 16, ("module load cuda",))
    assert launcher(["launcher=local"], tmp_path)[0] == "local"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["launcher=slrum"], "unknown launcher `slrum`", "slurm"),
        (["launcher=slurm", "launcher.partitoin=x"], "unknown key `launcher.partitoin`", "launcher.partition"),
        (["launcher=slurm", "launcher.time=4"], "`launcher.time` is `4`", ""),
        (["recipe=demo"], "`recipe` has no effect here", "cpt plan"),
        (["launchr=slurm"], "`launchr` has no effect here", "launcher"),
        (["launcher=slurm", "stages.x.tokens=1"], "`stages` has no effect here", "`recipe=NAME`"),
        (["slurm"], "is not `key=value`", ""),
    ],
)
def test_wrong_words_are_named(words: list[str], message: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(CptError) as error:
        launcher(words, tmp_path)
    assert message in error.value.message
    assert hint in " ".join(error.value.hints)


def test_a_wrong_launcher_is_a_mistake_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "launcher=slrum"]) == 2
    assert "unknown launcher `slrum`" in capsys.readouterr().err


def test_a_check_says_the_error_and_its_hint() -> None:
    def broken() -> check.Check:
        raise CptError("no answer", "ask again")

    assert check.run([("x", broken)]) == [check.Check("fail", "x", "no answer", "ask again")]
