"""What ranks need: torch and Megatron-core import, and two processes meet.

Both are tried in one process beside this one, `python -m cpt.doctor.engine`: a broken CUDA installation may end it, and
torch, which takes more than a second to import, is imported once. It prints one JSON value for each answer.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cpt.doctor.check import Check

ENGINE, RANKS = "torch and megatron-core", "two ranks"
_SECONDS = 120.0  # for everything; a file system that is slow for the first time is no failure
_MEET_SECONDS = 20.0
_KERNELS = ("transformer_engine", "apex")


def checks(
    command: tuple[str, ...] = (sys.executable, "-m", "cpt.doctor.engine"),
) -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every check of this file, with its name.

    Args:
        command: what tries it, for tests.
    """
    found: dict[str, Any] = {}
    yield ENGINE, lambda: _engine(_fill(found, command))
    yield RANKS, lambda: _ranks(found)


def _fill(found: dict[str, Any], command: tuple[str, ...]) -> dict[str, Any]:
    """Take in what the command answers, and why it gave no more answers."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, start_new_session=True)
        try:
            process.wait(_SECONDS)
            found["end"] = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            found["end"] = f"no end within {_SECONDS:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the two ranks as well
            process.wait()
        out.seek(0)
        errors.seek(0)
        for line in out:
            with contextlib.suppress(ValueError, TypeError):
                found |= json.loads(line)
        last = [line.strip() for line in errors if line.strip()][-1:]
        found["end"] = last[0] if last and process.returncode != -signal.SIGKILL else found["end"]
    return found


def _engine(found: dict[str, Any]) -> Check:
    if "megatron" not in found:
        problem = found.get("problem") or found["end"]
        return Check("fail", ENGINE, problem, "`pip install torch megatron-core` in this environment")
    devices = found["devices"]
    where = f"{len(devices)} GPUs ({devices[0]}), CUDA {found['cuda']}" if devices else "no GPU: ranks run on the CPU"
    kernels = ", ".join(found["kernels"]) or "neither Transformer Engine nor Apex, whose kernels are optional"
    text = f"torch {found['torch']}, megatron-core {found['megatron']}; {where}; {kernels}"
    if devices and not found["nccl"]:
        return Check("fail", ENGINE, f"{text}; no NCCL", "install a torch build with NCCL")
    return Check("ok", ENGINE, text)


def _ranks(found: dict[str, Any]) -> Check:
    if "torch" not in found:
        return Check("fail", RANKS, "not tried: torch does not import")
    if found.get("ranks") != "met":
        hint = "`GLOO_SOCKET_IFNAME=lo` binds ranks of one machine to its loopback device"
        return Check("fail", RANKS, found.get("ranks") or f"they did not meet: {found['end']}", hint)
    return Check("ok", RANKS, f"gloo works between two processes ({found['seconds']:.1f} s)")


def _try() -> None:
    """Print the answers: what the other process does."""
    warnings.simplefilter("ignore")
    import torch

    _answer(
        torch=str(torch.__version__), cuda=str(torch.version.cuda or ""), nccl=torch.distributed.is_nccl_available()
    )
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        # Before anything asks for a device: a process that has opened one cannot be forked. While Megatron-core is
        # imported, they meet.
        ranks = [_fork(rank, os.path.join(folder, "store"), os.path.join(folder, f"said_{rank}")) for rank in (0, 1)]
        try:
            import megatron.core

            _answer(megatron=str(megatron.core.__version__), kernels=[n for n in _KERNELS if _imports(n)])
        except Exception as error:
            _answer(problem=f"{type(error).__name__}: {error}".splitlines()[0])
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, _ in ranks]
        said = [Path(path).read_text() for _, path in ranks]
    if any(codes):
        problem = next((text for text in said if text), f"they ended with {codes[0]} and {codes[1]}")
        _answer(ranks=problem)
    else:
        _answer(ranks="met", seconds=max(float(text) for text in said) - begun)
    _answer(devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])


def _answer(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _imports(name: str) -> bool:
    try:
        __import__(name)
    except Exception:
        return False
    return True


def _fork(rank: int, store: str, said: str) -> tuple[int, str]:
    """Start a rank; its process, and the file in which it says when they had met, or what went wrong."""
    pid = os.fork()
    if pid:
        return pid, said
    code = 1
    try:
        _meet(rank, store)
        text, code = str(time.monotonic()), 0
    except BaseException as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    Path(said).write_text(text)
    os._exit(code)


def _meet(rank: int, store: str) -> None:
    """Find the other rank over gloo and add a number."""
    import torch
    import torch.distributed as dist

    wait = datetime.timedelta(seconds=_MEET_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)
    dist.barrier()
    dist.destroy_process_group()  # a thread of gloo that outlives its group ends the process with an abort
    if value.item() != 3.0:
        raise ValueError(f"1 + 2 is {value.item():g} over gloo")


if __name__ == "__main__":
    _try()
