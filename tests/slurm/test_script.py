"""The batch script on a real cluster, with a stand-in for the interpreter: its commands say what a test wants.

What an attempt is and how a stage ends is tried with real stages in `test_runs.py`; here it is what the script itself
promises: who gets which signal, what goes back into the queue, where ranks meet, and that names stay text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cpt
from cpt.launch import Work
from cpt.launch.batch import Order
from cpt.launch.slurm.options import Slurm
from tests.slurm.conftest import Cluster

CODE = Path(cpt.__file__).parents[1]
# Does `begin`, `end` and the ranks: words of `end` are taken from a file, ranks run the test's own program.
STAND_IN = """#!{python}
import os, sys, json, time
from pathlib import Path
sys.path.insert(0, {code!r})
what = sys.argv[3] if len(sys.argv) > 4 else "rank"
if what == "begin":
    run, stage = Path(sys.argv[4]), sys.argv[5]
    folder = run / "stages" / stage
    attempt = folder / f"attempt_{{len(list(folder.glob('attempt_*'))) + 1}}"
    (attempt / "logs").mkdir(parents=True)
    (attempt / "begin.json").write_text(json.dumps([sys.argv[1:], dict(os.environ)]))
    exec((run / "begin.py").read_text()) if (run / "begin.py").exists() else None
    print(attempt / "job.json")
elif what == "end":
    attempt = Path(sys.argv[4]).parent
    words = attempt.parent / "words"
    word, *rest = words.read_text().split() if words.exists() else ["done"]
    words.write_text(" ".join(rest or [word]))
    (attempt / "end.json").write_text(json.dumps(sys.argv[5]))
    print(word)
    sys.exit({{"done": 0, "failed": 1}}.get(word, 75))
else:
    job = Path(sys.argv[-1])
    sys.argv = [str(job)]
    exec(compile((job.parents[3] / "rank.py").read_text(), "rank.py", "exec"), {{"job": job, "__name__": "__main__"}})
"""
PROGRAM = "import os; print('rank', os.environ['SLURM_PROCID'], flush=True)\n"


class Stage:
    """A stage with a test's own ranks, and its script in the queue."""

    def __init__(self, cluster: Cluster, folder: Path, program: str = PROGRAM, name: str = "domain") -> None:
        self.cluster, self.run_dir = cluster, folder / "runs" / "r1"
        self.run_dir.mkdir(parents=True, exist_ok=True)
        python = folder / "python"
        python.write_text(STAND_IN.format(python=sys.executable, code=str(CODE)))
        python.chmod(0o755)
        (self.run_dir / "rank.py").write_text(program)
        self.work = Work(run_dir=self.run_dir, stage=name, world_size=4, layout="dp 4", python=str(python), cwd=folder)

    @property
    def folder(self) -> Path:
        return self.run_dir / "stages" / self.work.stage

    def words(self, *words: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "words").write_text(" ".join(words))

    def submit(self, options: Slurm, members: tuple[str, ...] = (), **order: object) -> str:
        script = options.write_script(self.work, members)
        return options.submit(Order(script=script, token=f"cpt-{time.time_ns()}", **order))  # type: ignore[arg-type]

    def log(self, id: str) -> str:
        return Slurm().log_of(self.work, id).read_text()

    def attempts(self) -> list[Path]:
        return sorted(self.folder.glob("attempt_*"))

    def wait_for(self, name: str, count: int = 4, seconds: float = 120) -> None:
        """Until ranks have written their files of a name into the newest attempt."""
        end = time.monotonic() + seconds
        while len(list(self.folder.glob(f"attempt_*/{name}*"))) < count:
            assert time.monotonic() < end, f"no {count} files `{name}*`"
            time.sleep(0.05)


@pytest.fixture
def real(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in list(cluster.environ):
        if name.startswith("SLURM_"):
            monkeypatch.setenv(name, cluster.environ[name])
    return cluster


TWO = {"ranks_per_node": 2, "nodes": 2}


def test_ranks_on_two_nodes_meet_by_a_file(real: Cluster, tmp_path: Path) -> None:
    program = """
import os
from cpt.launch.environment import rank_environment
from cpt.launch.rendezvous import meet
os.environ |= rank_environment(os.environ)
meet(job.parent, os.environ)
import torch, torch.distributed as dist
dist.init_process_group(os.environ.get("BACKEND", "gloo"))
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
print(value.item(), os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"], os.environ["SLURMD_NODENAME"])
dist.barrier()
dist.destroy_process_group()
"""
    stage = Stage(real, tmp_path, program)
    id = stage.submit(Slurm(**TWO))
    assert real.wait(id, seconds=120) == "COMPLETED", stage.log(id)
    (attempt,) = stage.attempts()
    told = [(attempt / "logs" / f"rank_{rank:04d}.log").read_text().split()[-4:] for rank in range(4)]
    places = [("0", "node1"), ("1", "node1"), ("0", "node2"), ("1", "node2")]
    assert told == [["10.0", local, "2", node] for local, node in places]
    assert json.loads((attempt / "rendezvous.json").read_text())["host"] != "127.0.0.1"


def test_saved_goes_back_into_the_queue_and_done_does_not(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path)
    stage.words("repeat", "done")
    id = stage.submit(Slurm(**TWO))
    child = stage.submit(Slurm(), after=((id,),))
    stage.wait_for("end.json", 1)
    real.start_now(id)
    assert real.wait(child) == "COMPLETED"
    assert real.state(id) == "COMPLETED" and "Restarts=1" in real.run("scontrol", "show", "job", id)
    assert "does not take the job back" not in stage.log(id)
    assert [json.loads((a / "end.json").read_text()) for a in stage.attempts()] == ["0", "0", "0"]  # third: the child


def test_where_no_job_goes_back_a_successor_goes_on(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path)
    stage.words("repeat", "done")
    options = Slurm(requeue=False, successors=2)
    first = stage.submit(options)
    second = stage.submit(options, after_failed=first)
    third = stage.submit(options, after_failed=second)
    child = stage.submit(options, after=((first, second, third),))
    assert real.wait(child) == "COMPLETED"
    assert [real.state(i) for i in (first, second, third)] == ["FAILED", "COMPLETED", "CANCELLED"]
    assert "ExitCode=75:0" in real.run("scontrol", "show", "job", first)


def test_a_site_that_refuses_a_requeue_gets_exit_75(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path, "import time; time.sleep(2)")
    stage.words("repeat")
    id = stage.submit(Slurm(**TWO))
    real.wait(id, "RUNNING")
    real.run("scontrol", "update", f"JobId={id}", "Requeue=0")
    assert real.wait(id) == "FAILED" and "does not take the job back" in stage.log(id)
    assert "ExitCode=75:0" in real.run("scontrol", "show", "job", id)


SAVES = """
import os, signal, sys, time
rank = os.environ["SLURM_PROCID"]
asked = []
def stop(number, frame):
    asked.append(signal.Signals(number).name)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, stop)
(job.parent / f"up{rank}").write_text("")
while not asked:
    time.sleep(0.05)
time.sleep(1.5)
(job.parent / f"saved{rank}").write_text(asked[0])
"""


def test_a_warning_reaches_the_ranks_and_the_job_goes_back(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path, SAVES)
    stage.words("repeat")
    options = Slurm(**TWO)
    id = stage.submit(options)
    stage.wait_for("up")
    options.ask_to_stop([id])
    real.wait(id, "PENDING")
    (attempt,) = stage.attempts()
    assert {(attempt / f"saved{rank}").read_text() for rank in range(4)} == {"SIGUSR2"}
    assert json.loads((attempt / "end.json").read_text()) == "0"
    real.run("scancel", id)


def test_a_cancelled_job_saves_and_never_goes_back(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path, SAVES)
    stage.words("repeat")
    options = Slurm(**TWO)
    id = stage.submit(options)
    stage.wait_for("up")
    options.cancel([id])
    assert real.wait(id) == "CANCELLED"
    stage.wait_for("end.json", 1)  # the state is final before the processes are
    (attempt,) = stage.attempts()
    assert {(attempt / f"saved{rank}").read_text() for rank in range(4)} == {"SIGTERM"}
    time.sleep(1)
    assert real.state(id) == "CANCELLED" and len(stage.attempts()) == 1


def test_a_dead_rank_ends_the_others(real: Cluster, tmp_path: Path) -> None:
    program = "import os, time; os.environ['SLURM_PROCID'] == '2' and os._exit(3); time.sleep(100)"
    stage = Stage(real, tmp_path, program)
    stage.words("failed")
    id = stage.submit(Slurm(**TWO))
    assert real.wait(id) == "FAILED"
    assert json.loads((stage.attempts()[0] / "end.json").read_text()) != "0"


def test_names_with_anything_in_them_stay_text(real: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / 'a b\'c;$(touch pwned) #y%j "q" `touch pwned` é'
    stage = Stage(real, folder, PROGRAM)
    value = "x y; $(touch pwned) #z \"q\" 's' \\"
    options = Slurm(**TWO, extra={"network": value}, variables={"A": value}, export="NONE", cpus_per_rank=1)
    id = stage.submit(options)
    assert real.wait(id) == "COMPLETED"
    assert "error" not in stage.log(id)
    (attempt,) = stage.attempts()
    assert [(attempt / "logs" / f"rank_{rank:04d}.log").read_text() for rank in range(4)] == [
        f"rank {rank}\n" for rank in range(4)
    ]
    assert json.loads((attempt / "begin.json").read_text())[1]["A"] == value
    told = real.run("scontrol", "show", "job", id)
    assert f"WorkDir={folder}\n" in told and f"Network={value}\n" in told
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("export", ["ALL", "NONE"])
def test_ranks_know_nothing_of_the_shell_that_submits_them(
    export: str, real: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("MINE", "yes")
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    program = (
        "import json, os; (job.parent / ('env' + os.environ['SLURM_PROCID'])).write_text(json.dumps(dict(os.environ)))"
    )
    stage = Stage(real, tmp_path, program)
    id = stage.submit(Slurm(**TWO, export=export, cpus_per_rank=2, environment=["export FROM_PROFILE=$((1 + 1))"]))
    assert real.wait(id) == "COMPLETED", stage.log(id)
    environ = json.loads((stage.attempts()[0] / "env3").read_text())
    assert not {"RANK", "MASTER_ADDR"} & set(environ) and "PATH" in environ
    assert environ["OMP_NUM_THREADS"] == "2" and environ["FROM_PROFILE"] == "2"
    assert environ.get("MINE") == ("yes" if export == "ALL" else None)


def test_by_hand_it_is_the_same(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path)
    script = Slurm(**TWO).write_script(stage.work)
    id = real.run("sbatch", "--parsable", script, cwd=Path("/"))
    assert real.wait(id) == "COMPLETED"
    assert "rank 3" in (stage.attempts()[0] / "logs" / "rank_0003.log").read_text()
    assert Slurm().log_of(stage.work, id).exists()


def test_an_array_runs_each_member_in_its_own_folder(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path, name="mix")
    members = ("mix.a", "mix.b", "mix.c")
    options = Slurm(ranks_per_node=4, array_limit=1)
    id = stage.submit(options, members)
    for i, member in enumerate(members):
        assert real.wait(f"{id}_{i}") == "COMPLETED"
        assert (stage.run_dir / "stages" / member / "attempt_1" / "logs" / "rank_0003.log").exists()
        assert options.log_of(stage.work, id, i).exists()


def test_a_job_knows_when_it_ends(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path)
    (stage.run_dir / "begin.py").write_text(
        "from cpt.launch.slurm.options import Slurm\n"
        "inside = Slurm(warn=180).inside(os.environ)\n"
        "(attempt / 'inside.json').write_text(json.dumps([inside.id, inside.stop_at - time.time()]))\n"
    )
    id = stage.submit(Slurm(**TWO, time="10m"))
    assert real.wait(id) == "COMPLETED", stage.log(id)
    told, left = json.loads((stage.attempts()[0] / "inside.json").read_text())
    assert told == id and 380 < left <= 420


def test_a_preempted_job_saves_and_slurm_alone_takes_it_back(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path, SAVES)
    stage.words("repeat")
    id = stage.submit(Slurm(**TWO, partition="spot", exclusive=True))
    stage.wait_for("up")
    real.run("sbatch", "--parsable", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    stage.wait_for("end.json", 1)
    real.wait(id, "PENDING")
    (attempt,) = stage.attempts()
    assert {(attempt / f"saved{rank}").read_text() for rank in range(4)} == {"SIGTERM"}
    assert "Restarts=1" in real.run("scontrol", "show", "job", id)
    real.run("scancel", id)


def test_a_job_that_is_cancelled_before_its_ranks_start_gives_the_stage_back(real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path)
    stage.words("repeat")
    (stage.run_dir / "begin.py").write_text("(attempt / 'here').write_text(''); time.sleep(2)")
    id = stage.submit(Slurm(**TWO))
    stage.wait_for("here", 1)
    real.run("scancel", id)
    stage.wait_for("end.json", 1)
    (attempt,) = stage.attempts()
    assert json.loads((attempt / "end.json").read_text()) == "75"
    assert real.wait(id) == "CANCELLED" and not list((attempt / "logs").iterdir())


@pytest.mark.parametrize("how", [["--full"], ["--batch"]])
def test_a_signal_to_the_script_itself_does_not_end_it(how: list[str], real: Cluster, tmp_path: Path) -> None:
    stage = Stage(real, tmp_path, SAVES)
    stage.words("stopped")
    id = stage.submit(Slurm(**TWO))
    stage.wait_for("up")
    real.run("scancel", *how, "--signal=USR2", id)
    if how == ["--batch"]:
        time.sleep(0.5)
        assert real.state(id) == "RUNNING"
        real.run("scancel", "--signal=USR2", id)
    assert real.wait(id) == "FAILED"
    (attempt,) = stage.attempts()
    assert len(list(attempt.glob("saved*"))) == 4 and json.loads((attempt / "end.json").read_text()) == "0"


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"gpus": "per_node"}, ["0,1"] * 4),
        ({"gpus": "gres"}, ["0,1"] * 4),
        ({"gpus": "per_node", "srun_args": ["--gpus-per-task=1"]}, ["0", "1"] * 2),
    ],
)
def test_each_rank_sees_the_gpus_of_its_node(
    options: dict[str, object],
    seen: list[str],
    clusters: Callable[..., Cluster],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = clusters("gpus", "--gpus", "2")
    monkeypatch.setenv("SLURM_CONF", cluster.environ["SLURM_CONF"])
    stage = Stage(cluster, tmp_path, "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    id = stage.submit(Slurm(**TWO, **options))  # type: ignore[arg-type]
    assert cluster.wait(id) == "COMPLETED", stage.log(id)
    logs = stage.attempts()[0] / "logs"
    assert [(logs / f"rank_{rank:04d}.log").read_text().strip() for rank in range(4)] == seen
