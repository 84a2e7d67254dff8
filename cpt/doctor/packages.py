"""Python and the packages: versions, and whether the heavy ones import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from cpt.doctor.check import Check

_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
found = {}
import torch
found["torch"] = str(torch.__version__)
found["cuda"] = str(torch.version.cuda or "")
found["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
found["nccl"] = torch.distributed.is_nccl_available()
import megatron.core
found["megatron"] = str(megatron.core.__version__)
for name in ("transformer_engine", "apex"):
    try:
        __import__(name)
        found[name] = True
    except Exception:
        found[name] = False
print("PROBE" + json.dumps(found))
"""
_EXTRAS = {"gigatoken": "fast", "simple-icd-10-cm": "demo", "transformers": "eval"}


def checks() -> Iterator[tuple[str, Callable[[], Check]]]:
    """Every check of this file, with its name."""
    yield "python", _python
    yield "packages", _packages
    yield "extras", _extras
    yield "torch and megatron-core", _engine


def _python() -> Check:
    return Check("ok", "python", f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})")


def _packages() -> Check:
    """Every requirement is there in a version that it allows."""
    from packaging.requirements import Requirement

    wrong = []
    for text in requires("cpt") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found} is not {wanted.specifier}")
    if wrong:
        return Check("fail", "packages", "; ".join(wrong), "`pip install cpt` again in this environment")
    return Check("ok", "packages", "all there, in versions that fit")


def _extras() -> Check:
    missing = []
    for name, extra in _EXTRAS.items():
        try:
            version(name)
        except PackageNotFoundError:
            missing.append((name, extra))
    if not missing:
        return Check("ok", "extras", "fast, demo, eval")
    names = ", ".join(f"{name} (for `{extra}`)" for name, extra in missing)
    extras = ",".join(dict.fromkeys(extra for _, extra in missing))
    return Check("warn", "extras", f"not installed: {names}", f"`pip install 'cpt[{extras}]'` where you need them")


def _engine() -> Check:
    """In a process of its own: a broken CUDA installation may end it."""
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120)
    line = next((text for text in done.stdout.splitlines() if text.startswith("PROBE")), None)
    if line is None:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check("fail", "torch and megatron-core", last, "`pip install torch megatron-core` in this environment")
    found = json.loads(line.removeprefix("PROBE"))
    devices = found["devices"]
    where = f"{len(devices)} GPUs ({devices[0]}), CUDA {found['cuda']}" if devices else "no GPU: ranks run on the CPU"
    kernels = [name for name in ("transformer_engine", "apex") if found[name]]
    text = f"torch {found['torch']}, megatron-core {found['megatron']}; {where}"
    text += (
        f"; {', '.join(kernels)}" if kernels else "; neither Transformer Engine nor Apex, whose kernels are optional"
    )
    if devices and not found["nccl"]:
        return Check("fail", "torch and megatron-core", f"{text}; no NCCL", "install a torch build with NCCL")
    return Check("ok", "torch and megatron-core", text)
