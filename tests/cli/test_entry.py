"""The command as a person starts it: its own process, exit codes, streams, pipes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import tree, write_project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("entry"))


def cpt(project: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("cpt")
    start = [str(command)] if command.exists() else [sys.executable, "-m", "cpt"]
    clean = {k: v for k, v in os.environ.items() if k != "CPT_CACHE"} | environ
    return subprocess.run([*start, *arguments], cwd=project, env=clean, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "recipe=two"], 0, ""),
        (["plan", "recipe=tow"], 2, "did you mean `two`?"),
        (["plan", "recipe=two", "stages.domain.token=1B"], 2, "did you mean `stages.domain.tokens`?"),
        (["plan", "recipe=two", "train.seed=1,2"], 2, "has several values"),
        (["plan", "recipe=two", "stages.domain.mixture={lwa: 1}"], 2, "did you mean `law`?"),
        (["plan", "recipe=two", "base=\udcff"], 2, "is not UTF-8"),
        (["plan", "recipe=two", "+a._target_=os.system"], 2, "calls nothing"),
        (["plan", "recipe=two", "name=${oc.env:HOME}"], 2, "is not allowed"),
        (["plan", "recipe=two", "x=[" * 500], 2, "cannot be read"),
        (["paln"], 2, "did you mean `plan`?"),
        (["plan", "--verbos", "recipe=two"], 2, "unknown flag"),
        (["plan"], 2, "no recipe was given"),
    ],
)
def test_exit_codes_and_streams(project: Path, arguments: list[str], code: int, said: str) -> None:
    before = tree(project)
    ended = cpt(project, *arguments)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr and "Traceback" not in ended.stderr
    assert bool(ended.stdout) == (code == 0)
    assert tree(project) == before


def test_a_reader_that_goes_away_is_no_error(project: Path) -> None:
    script = f"{sys.executable} -m cpt recipes show two | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_a_terminal_that_knows_only_ascii_gets_a_plan_too(project: Path) -> None:
    ended = cpt(project, "plan", "recipe=two", PYTHONIOENCODING="ascii", LC_ALL="C")
    assert ended.returncode == 0 and ended.stdout.startswith("plan "), ended.stderr


def test_a_machine_without_the_demo_extra_gets_the_install_line(project: Path) -> None:
    code = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'simple_icd_10_cm': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, No())\n"
        "import importlib.metadata as m, importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda n, p=None: None if n.split('.')[0] == 'simple_icd_10_cm' else real(n, p)\n"
        "from cpt.cli import main\n"
        "sys.exit(main(['plan', 'recipe=demo']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install" in done.stderr, done.stderr
