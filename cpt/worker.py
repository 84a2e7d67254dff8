"""What each rank runs: reads the plan and its job, does the stage's work, leaves a record of how it ended.

    python -m cpt.worker JOB.json               one rank; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are
                                                in the environment, as torchrun sets them; or srun's own words are, and
                                                the ranks find each other (see `launch.rendezvous`)
    python -m cpt.worker --ranks 4 JOB.json     all ranks of one machine, forked by one parent (see `launch.fork`)

Exit codes: 0 done · 75 saved, more to do · 4 a `stop_if` guard ended it · else failed. Under srun, which ends all ranks
when one ends with another code than 0, the first three are 0: the rank's record tells them apart (`launch.outcome`).
Nothing heavy is imported at the top: helper processes of a save import this file again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from cpt.base import processes
from cpt.base.errors import DONE, GUARD, SAVED
from cpt.launch.environment import rank_environment

if __name__ == "__mp_main__":  # a helper process that `multiprocessing` spawned from a rank
    processes.die_with_parent(os.getppid())

# What torch and Megatron-core say at import about packages that this machine need not have; `cpt doctor` tells it once.
_QUIET = ("Apex", "apex", "Transformer Engine", "transformer_engine", "Triton", "flash")

_GOOD = (DONE, SAVED, GUARD)


def main(arguments: list[str]) -> int:
    """Run one rank, or the parent of `--ranks N`."""
    num_ranks: int | None = None
    if arguments[:1] == ["--ranks"]:
        num_ranks, arguments = int(arguments[1]), arguments[2:]
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m cpt.worker [--ranks N] JOB.json\n")
        return 2
    job = Path(arguments[0])
    if num_ranks is None:
        by_srun = rank_environment(os.environ)
        os.environ |= by_srun
        code = rank_main(job)
        # srun ends all other ranks at the first code that is not 0, and one that has saved is done before others are.
        return _take_leave(0 if by_srun and code in _GOOD else code)
    return parent_main(num_ranks, job)


def parent_main(num_ranks: int, job_path: Path) -> int:
    """Fork the ranks of one machine and wait for them."""
    from cpt.launch.fork import run_ranks
    from cpt.launch.heartbeat import hang_after
    from cpt.stages import STAGES
    from cpt.stages.attempt import pulse, read_job

    plan, job = read_job(job_path)
    _filter_warnings()
    kind = STAGES.get(plan.stages[job.stage].kind)
    return run_ranks(
        num_ranks,
        job_path.parent,
        lambda: rank_main(job_path, is_watched=True),
        kind.modules,
        pulse(job_path),
        hang_after(os.environ),
    )


def rank_main(job_path: Path, *, is_watched: bool = False) -> int:
    """One rank's work from start to end; its exit code. Never raises: the error is in the record and in the log.

    Args:
        is_watched: a parent on this machine looks for hangs; else the ranks do so themselves.
    """
    import faulthandler

    from cpt.base.errors import DONE, FAILED, GUARD, SAVED, CptError
    from cpt.base.lock import Fence
    from cpt.launch.heartbeat import Heartbeat, hang_after, record_flights
    from cpt.launch.outcome import write_record
    from cpt.launch.rendezvous import meet
    from cpt.stages import STAGES
    from cpt.stages.attempt import read_job

    faulthandler.enable()
    processes.bind_children()
    rank = int(os.environ.get("RANK", "0"))
    failure: dict[str, Any] | None = None
    alive: Heartbeat | None = None
    try:
        _filter_warnings()
        plan, job = read_job(job_path)
        record_flights(job_path.parent, os.environ)
        alive = Heartbeat(
            job_path.parent,
            rank,
            int(os.environ.get("WORLD_SIZE", "1")),
            hang_after=hang_after(os.environ),
            is_watched=is_watched,
            fence=Fence(job_path.parent.parent, job.fence) if job.queue_job and job.fence else None,
        )
        alive.start()
        meet(job_path.parent, os.environ, plan.launcher.get("interface", ()))
        code = int(STAGES.get(plan.stages[job.stage].kind).work(plan, job))
        if code not in (DONE, SAVED, GUARD):
            failure = {"kind": "exit", "error": f"ended with exit code {code}"}
    except BaseException as error:
        stopped = isinstance(error, CptError) and error.exit_code in (SAVED, GUARD)
        code = error.exit_code if stopped else FAILED  # type: ignore[attr-defined]
        if not stopped:
            from cpt.launch.explain import explain

            _print(error)
            failure = explain(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if alive is not None:
        alive.stop()
    write_record(job_path.parent, rank, code, failure)
    return code


def _print(error: BaseException) -> None:
    """An error into the rank's log; one that says itself what is wrong needs no traceback."""
    import traceback

    from cpt.base.errors import CptError

    if isinstance(error, CptError):
        hints = "".join(f"hint: {hint}\n" for hint in error.hints)
        sys.stderr.write(f"error: {error.message}\n" + (f"\n{hints}" if hints else ""))
    else:
        traceback.print_exc()


def _filter_warnings() -> None:
    import warnings

    for word in _QUIET:
        warnings.filterwarnings("ignore", message=f".*{word}.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\..*")


def _take_leave(code: int) -> int:
    """End now: exit handlers of the libraries would wait for helpers that may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
