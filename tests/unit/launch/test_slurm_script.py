"""Options of a cluster, and that what a person writes reaches the shell as text or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.base.errors import UsageError
from cpt.base.records import to_json
from cpt.launch import LAUNCHERS, Work, launcher_of
from cpt.launch.slurm import script
from cpt.launch.slurm.options import Slurm, dependency

HOSTILE = (
    "; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "a\ntouch pwned",
    "a\n#SBATCH --wrap=touch",
    "a\r\ntouch pwned",
    "a\u2028touch pwned",
    "a\x85touch pwned",
    "a\x0btouch pwned",
    "-n1 --output=/pwned",
    "%x%j%n",
    "a b # c",
    "\\",
    "{{ 7 * 7 }}",
    "${IFS}touch${IFS}pwned",
    "a\x00b",
    "\x1b[31m",
    "\udcff",
)
TEXTS = ("partition", "account", "qos", "constraint", "reservation", "time", "gres_type", "mem", "python", "signal")
LISTS = ("srun_args", "wrap_command", "environment", "interface")
OURS = {"job-name", "comment", "chdir", "output", "open-mode", "nodes", "ntasks-per-node", "signal", "requeue"}
OURS |= {"kill-on-invalid-dep", "export"}


def work(folder: Path, **changes: Any) -> Work:
    given = {
        "run_dir": folder / "runs" / "medical-7c1e92",
        "stage": "domain",
        "world_size": 4,
        "layout": "tp 2, pp 2, dp 1",
        "python": "/opt/my env/bin/python",
        "cwd": folder,
    }
    return Work(**given | changes)


def sbatch_lines(text: str) -> dict[str, str]:
    """The options that sbatch finds: from lines that begin with its word, up to the first command."""
    found = {}
    for line in text.split("\n"):
        if line.startswith("#SBATCH "):
            words = shlex.split(line.removeprefix("#SBATCH "))
            assert len(words) == 1, line
            name, _, value = words[0].removeprefix("--").partition("=")
            found[name] = value
        elif line.strip() and not line.startswith("#"):
            break
    return found


def seen_by_shell(folder: Path, options: Slurm, given: Work, members: tuple[str, ...] = ()) -> list[list[str]]:
    """Run the script with an interpreter, srun and scontrol that only write down what they are called with."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    attempt = folder / "attempt"
    python = tools / "python"
    for name in ("python", "srun", "scontrol"):
        (tools / name).write_text(
            "#!/usr/bin/env bash\n"
            f'{{ printf "%s\\0" {name} "$@"; printf "\\n\\0"; }} >> {shlex.quote(str(folder / "seen"))}\n'
            f'case "$*" in *" begin "*) echo {shlex.quote(str(attempt / "job.json"))};; *" end "*) echo repeat;; esac\n'
        )
        (tools / name).chmod(0o755)
    path = script.write(options, dataclasses.replace(given, python=str(python)), members)
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_CPUS_PER_NODE": "8(x2),4"}
    if members:
        environ["SLURM_ARRAY_TASK_ID"] = "1"
    done = subprocess.run(["bash", str(path)], cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    calls: list[list[str]] = [[]]
    for word in (folder / "seen").read_text(errors="surrogateescape").split("\0"):
        if word == "\n":
            calls.append([])
        else:
            calls[-1].append(word)
    return calls[:-1]


def test_the_script_does_what_a_local_run_does(tmp_path: Path) -> None:
    calls = seen_by_shell(tmp_path, Slurm(ranks_per_node=2), work(tmp_path))
    (_, *begin), (_, *ranks), (_, *end), requeue = calls
    run = str(tmp_path / "runs" / "medical-7c1e92")
    assert begin[:5] == ["-m", "cpt.stages.attempt", "begin", run, "domain"] and begin[5] == "--holder"
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--kill-on-bad-exit=1", "--export=ALL"} <= set(ranks)
    assert "--cpus-per-task=2" in ranks  # of the smallest node
    assert f"--output={tmp_path}/attempt/logs/rank_%4t.log" in ranks
    assert ranks[-3:] == ["-m", "cpt.worker", str(tmp_path / "attempt" / "job.json")]
    assert end == ["-m", "cpt.stages.attempt", "end", str(tmp_path / "attempt" / "job.json"), "0"]
    assert requeue == ["scontrol", "requeue", "7"]


def test_an_element_of_an_array_takes_its_stage(tmp_path: Path) -> None:
    calls = seen_by_shell(tmp_path, Slurm(array_limit=2), work(tmp_path, stage="mix"), ("mix.a", "mix.b", "mix.c"))
    assert calls[0][5] == "mix.b"
    path = tmp_path / "runs" / "medical-7c1e92" / "stages" / "mix" / "proxies.sbatch"
    assert sbatch_lines(path.read_text())["array"] == "0-2%2"
    log = script.log_path(work(tmp_path, stage="mix"), "95", 2)
    assert log.name == "medical-7c1e92-mix-proxies-95_2.log" and log.parent.is_dir()


def test_nothing_goes_back_into_the_queue_where_that_is_forbidden(tmp_path: Path) -> None:
    calls = seen_by_shell(tmp_path, Slurm(requeue=False, successors=2), work(tmp_path))
    assert [call[0] for call in calls] == ["python", "srun", "python"]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_names_of_folders_and_stages_stay_text(value: str, tmp_path: Path) -> None:
    for changes in ({"stage": value}, {"run_dir": tmp_path / f"r{value}"}, {"cwd": tmp_path / f"c{value}"}):
        given = work(tmp_path, layout=value, **changes)
        try:
            given.cwd.mkdir(parents=True, exist_ok=True)
            calls = seen_by_shell(tmp_path, Slurm(), given)
        except (UsageError, ValueError, UnicodeEncodeError):  # refused, by us or by the file system
            assert not value.isprintable() or "\\" in value
            (tmp_path / "seen").unlink(missing_ok=True)
            continue
        assert calls[0][4:6] == [str(given.run_dir), given.stage]
        (tmp_path / "seen").unlink()
        path = given.run_dir / "stages" / given.stage / "job.sbatch"
        assert set(sbatch_lines(path.read_text())) == OURS
        assert sbatch_lines(path.read_text())["chdir"] == str(given.cwd)
    assert not list(tmp_path.rglob("*pwned")) or "pwned" in value
    assert not [p for p in tmp_path.rglob("pwned") if p.is_file()]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_members_of_an_array_stay_text(value: str, tmp_path: Path) -> None:
    if re.search("[\0\r\udcff]", value):
        with pytest.raises((UsageError, UnicodeEncodeError)):
            script.write(Slurm(), work(tmp_path), ("a", value))
        return
    assert seen_by_shell(tmp_path, Slurm(), work(tmp_path), ("a", value))[0][5] == value
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_options_are_refused_or_stay_text(value: str, tmp_path: Path) -> None:
    tries: list[Mapping[str, Any]] = [{name: value} for name in TEXTS]
    tries += [{name: [value]} for name in LISTS if name != "environment"]
    tries += [
        {"extra": {"nice": value}},
        {"extra": {value: "1"}},
        {"variables": {"A": value}},
        {"variables": {value: "1"}},
        {"container": {"image": value}},
        {"container": {"image": "/i", "mounts": [value]}},
        {"container": {"image": "/i", "workdir": f"/{value}"}},
        {"template": value},
        {"gpus": value, "ranks_per_node": 2},
        {"export": value},
    ]
    for i, options in enumerate(tries):
        folder = tmp_path / str(i)
        folder.mkdir()
        try:
            made = Slurm(**options)
            calls = seen_by_shell(folder, made, work(folder))
        except UsageError as error:
            assert all(line.isprintable() for line in (error.message, *error.hints))
            continue
        assert [call[0] for call in calls] == ["python", "srun", "python", "scontrol"]
        path = next(folder.rglob("job.sbatch"))
        found = sbatch_lines(path.read_text())
        assert set(found) - OURS <= set(options) | {"nice", "mem"}
        name = next(iter(options))
        if name in ("srun_args", "wrap_command"):
            assert value in calls[1]
        elif name == "python":
            assert calls[1][-4] == value
        elif name == "extra":
            assert found["nice"] == value
        elif name == "container":
            assert any(value in word for word in calls[1])
        assert not [p for p in folder.rglob("pwned*") if p.is_file()]


def test_lines_of_the_environment_are_the_persons_own_and_stay_one_line(tmp_path: Path) -> None:
    text = script.render(Slurm(environment=["module load cuda; export A=$(date)"]), work(tmp_path))
    assert "\nmodule load cuda; export A=$(date)\n" in text
    for value in ("a\nb", "a\rb", "a\u2028b", "a\u2029b", "a\x85b", "a\x00", "a\tb", "", "  "):
        with pytest.raises(UsageError, match=r"launcher\.environment"):
            Slurm(environment=[value])


def test_variables_reach_the_job_as_they_are(tmp_path: Path) -> None:
    value = 'it\'s $HOME `x` "y" \\ %j é'
    made = Slurm(variables={"A": value}, environment=[f'printf "%s" "$A" > {shlex.quote(str(tmp_path / "before"))}'])
    text = script.render(made, work(tmp_path))
    line = next(line for line in text.splitlines() if line.startswith("export A="))
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "$A"'], capture_output=True, text=True, check=True)
    assert done.stdout == value


PRINTABLE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=30)


@given(value=st.one_of(st.text(max_size=30), PRINTABLE))
def test_no_value_of_an_sbatch_line_makes_another_option(value: str) -> None:
    try:
        made = Slurm(extra={"nice": value, "contiguous": True})
    except UsageError:
        return
    found = sbatch_lines(script.render(made, work(Path("/home/me"))))
    assert set(found) == OURS | {"nice", "contiguous"} and found["nice"] == value


@given(words=st.lists(st.text(st.characters(exclude_characters="\0\r", exclude_categories=("Cs",)), max_size=20)))
def test_any_words_are_quoted_as_the_shell_reads_them(words: list[str]) -> None:
    assert shlex.split(script._quoted(words)) == words


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "partition": st.sampled_from(["gpu", "a,b"]),
            "time": st.sampled_from(["4h", "90m", "1-12:00:00", "0.5d"]),
            "nodes": st.integers(1, 64),
            "ranks_per_node": st.integers(1, 16),
            "mem": st.sampled_from(["0", "64G", 0]),
            "extra": st.dictionaries(st.sampled_from(["nice", "mail-type"]), st.one_of(PRINTABLE, st.integers())),
            "variables": st.dictionaries(st.sampled_from(["A", "B_1"]), PRINTABLE),
            "environment": st.lists(st.sampled_from(["module purge", "module load x"])),
            "interface": st.one_of(st.just("ib"), st.lists(st.sampled_from(["ib", "eth0"]))),
            "container": st.sampled_from(
                ["/i.sqsh", {"image": "/i", "mounts": ["/a"]}, {"image": "/i", "workdir": "/w"}]
            ),
            "warn": st.sampled_from([30, "3m", "200s"]),
            "hang_after": st.sampled_from([0, 60, "30m", 1.5e3]),
        },
    )
)
def test_options_come_back_from_a_plan_as_they_were(options: dict[str, Any]) -> None:
    try:
        made = Slurm(**options)
    except UsageError:  # blanks only
        return
    kept = json.loads(json.dumps({"name": "slurm", **to_json(dataclasses.asdict(made))}))
    again = launcher_of(kept)
    assert again == made
    assert json.loads(json.dumps({"name": "slurm", **to_json(dataclasses.asdict(again))})) == kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"time": 30}, "with its unit"),
        ({"time": "30"}, "with its unit"),
        ({"time": "1:30"}, "1:30"),
        ({"time": "soon"}, "length of time"),
        ({"time": "0s"}, "from a minute"),
        ({"time": "2m"}, "launcher.warn"),
        ({"nodes": 0}, "whole number"),
        ({"nodes": True}, "whole number"),
        ({"gpus": "per_nod"}, "one of"),
        ({"gpus": "gres"}, "ranks_per_node"),
        ({"gres_type": "a100"}, "no effect"),
        ({"successors": 2}, "no effect"),
        ({"export": "none"}, "one of"),
        ({"signal": "KILL"}, "one of"),
        ({"mem": "lots"}, "an amount"),
        ({"extra": {"time": "1h"}}, "launcher.time"),
        ({"extra": {"gres": "gpu:1"}}, "launcher.gpus"),
        ({"extra": {"--dependency": "x"}}, "needs its own"),
        ({"extra": {"mail_type": "x"}}, "long names"),
        ({"extra": ["x"]}, "a mapping"),
        ({"variables": {"A": True}}, "a text"),
        ({"variables": {"RANK": "1"}}, "who they are"),
        ({"variables": {"A-B": "1"}}, "names of"),
        ({"container": {"imag": "x"}}, "launcher.container.imag"),
        ({"container": {"image": "/i", "mounts": ["data"]}}, "absolute"),
        ({"container": "/i", "wrap_command": ["x"]}, "give one"),
        ({"environment": [True]}, "list of texts"),
        ({"warn": "x"}, "length of time"),
        ({"requeue": "no"}, "`true` or `false`"),
    ],
)
def test_options_refuse_nonsense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Slurm(**options)
    assert re.search(re.escape(said), str(caught.value)) and "launcher." in caught.value.message


def test_the_class_is_found_by_its_name() -> None:
    assert LAUNCHERS.get("slurm") is Slurm
    assert Slurm(nodes=2, ranks_per_node=4).num_devices() == 8
    assert Slurm(ranks_per_node=4).num_devices() is Slurm(nodes=2).num_devices() is None


@pytest.mark.parametrize(
    ("nodes", "per_node", "ranks", "found"),
    [
        (None, None, 4, (1, 4)),
        (2, None, 4, (2, 2)),
        (None, 4, 16, (4, 4)),
        (4, 8, 1, (1, 1)),
        (None, 8, 12, (2, 6)),
        (8, 2, 6, (3, 2)),
        (2, 4, 8, (2, 4)),
    ],
)
def test_as_few_nodes_as_hold_the_ranks_evenly(
    nodes: int | None, per_node: int | None, ranks: int, found: tuple[int, int]
) -> None:
    made = Slurm(nodes=nodes, ranks_per_node=per_node)
    assert script.shape(made, work(Path("/x"), world_size=ranks)) == found


def test_more_ranks_than_places_are_refused() -> None:
    with pytest.raises(UsageError, match="no even places"):
        script.shape(Slurm(nodes=2, ranks_per_node=2), work(Path("/x"), world_size=8))


@pytest.mark.parametrize(
    ("after", "failed", "text"),
    [
        ((), None, None),
        ((("1",),), None, "afterok:1"),
        ((("1",), ("2",), ("1",)), None, "afterok:1:2"),
        ((("1", "2"),), None, "afterok:1?afterok:2"),
        ((("1", "2"), ("3",)), None, "afterok:3,afterany:1:2"),
        ((("1", "2"), ("3", "4")), None, "afterany:1:2:3:4"),
        ((), "5", "afternotok:5"),
        ((("1",),), "5", "afterok:1,afternotok:5"),
        ((("1", "2"),), "5", "afterany:1:2,afternotok:5"),
    ],
)
def test_what_a_job_waits_for(after: tuple[tuple[str, ...], ...], failed: str | None, text: str | None) -> None:
    assert dependency(after, failed) == text


def test_a_persons_template_is_used_and_its_errors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "my.j2"
    made = Slurm(template="my.j2")
    with pytest.raises(UsageError, match="no file"):
        script.render(made, work(tmp_path))
    path.write_text("#!/bin/bash\nrun={{ run_dir | q }}\n")
    assert script.render(made, work(tmp_path)) == f"#!/bin/bash\nrun={tmp_path}/runs/medical-7c1e92\n"
    for text, said in (
        ("#!/bin/bash\n{{ run_dir }}", "as it is"),
        ("#!/bin/bash\n{{ nothing | q }}", "nothing"),
        ("#!/bin/bash\n{% if %}", "line 2"),
        ("echo", "first line"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=said):
            script.render(made, work(tmp_path))


def test_a_job_knows_itself_and_its_end() -> None:
    made = Slurm(time="1h")
    assert made.inside({}) is None
    import time

    end = int(time.time()) + 1000
    inside = made.inside({"SLURM_JOB_ID": "9", "SLURM_JOB_END_TIME": str(end)})
    assert inside is not None and inside.id == "9" and inside.stop_at == pytest.approx(end - 180, abs=2)
    assert inside.warned_from == pytest.approx(end - 180 - 60, abs=2)
    array = {"SLURM_JOB_ID": "97", "SLURM_ARRAY_JOB_ID": "95", "SLURM_ARRAY_TASK_ID": "2"}
    found = made.inside({**array, "SLURM_JOB_END_TIME": str(int(time.time()) + 100)})
    assert found is not None and found.id == "95_2" and found.stop_at == pytest.approx(time.time() + 50, abs=2)
