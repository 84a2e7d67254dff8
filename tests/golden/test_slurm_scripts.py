"""Batch scripts of six kinds of clusters kept as files. `make golden` writes them anew."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cpt.launch import Work, launcher_of
from cpt.launch.slurm import script
from cpt.launch.slurm.options import Slurm
from tests.command import cpt, write_project

FOLDER = Path(__file__).parent / "slurm"
STYLES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MEMBERS = {"no_requeue": ("mix.p0", "mix.p1", "mix.p2")}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_project(folder)
    (folder / "conf" / "launcher").mkdir(parents=True)
    for path in FOLDER.glob("*.yaml"):
        shutil.copy(path, folder / "conf" / "launcher")
    return folder


@pytest.mark.parametrize("style", STYLES)
def test_scripts(style: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr(script, "_code", lambda: "/home/me/cpt" if style == "cpu" else "")
    ended = cpt("plan", "recipe=two", "train.parallel.dp=1", f"launcher={style}", "--json")
    assert ended.code == 0, ended.err
    value = json.loads(ended.out)
    options = launcher_of(value.get("plan", value)["launcher"])  # as it comes back from a plan
    assert isinstance(options, Slurm)
    run = Path("/home/me/runs/medical-7c1e92")
    python = "/home/me/.venv/bin/python"
    sender = (python, "-m", "cpt.report.wandb_process", str(run), "--beside")
    work = Work(
        run_dir=run,
        stage="mix" if style in MEMBERS else "domain",
        world_size=options.num_devices() or 4,
        layout="tp 2, pp 1, dp auto",
        python=python,
        cwd=Path("/home/me"),
        afterwards=((python, "-m", "cpt", "report", str(run), "--quiet"),),
        beside=sender if style == "cpu" else (),
    )
    text = script.render(options, work, MEMBERS.get(style, ()))
    path = FOLDER / f"{style}.sbatch"
    if os.environ.get("CPT_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"`make golden` writes {path.name}"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("style", STYLES)
def test_the_shell_reads_them(style: str) -> None:
    path = FOLDER / f"{style}.sbatch"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-S", "warning", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_the_shipped_example_names_every_option() -> None:
    import dataclasses

    import yaml

    lines = (Path(__file__).parents[2] / "conf" / "launcher" / "slurm-example.yaml").read_text().splitlines()
    keys = {f.name for f in dataclasses.fields(Slurm)}
    given = [line for line in lines if line.removeprefix("# ").partition(":")[0] in keys or line.startswith("#   - ")]
    values = yaml.safe_load("\n".join(line.removeprefix("# ") for line in given))
    assert set(values) == keys
    one = {"container": None, "successors": 0}  # two of its lines exclude two others
    assert Slurm(**values | one).num_devices() == 32
