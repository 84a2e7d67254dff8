"""What a run folder says about how it came to be: plan, command, versions, machine, code.

No secrets: of the environment only the few variables named here are kept.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt import __version__
from cpt.base.files import append_line, read_json, write_atomic, write_json
from cpt.base.records import to_json
from cpt.plan.types import RunPlan

PACKAGES = ("torch", "megatron-core", "numpy", "tokenizers", "gigatoken", "safetensors", "pyarrow", "wandb")
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_CLUSTER_NAME",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "CONDA_DEFAULT_ENV",
    "VIRTUAL_ENV",
)
_LONGEST_DIFF = 2_000_000  # bytes


def write_plan(run_dir: Path, plan: RunPlan) -> None:
    """`plan.json` for the ranks and `plan.yaml` for people."""
    import yaml

    write_json(run_dir / "plan.json", to_json(plan))
    text = yaml.safe_dump(to_json(plan.config), sort_keys=False, allow_unicode=True, width=120)
    head = f"# {plan.name} · plan {plan.id}\n# The recipe as composed; what the ranks read is plan.json.\n"
    write_atomic(run_dir / "plan.yaml", head + text)


def write_command(run_dir: Path, command: Sequence[str], now: float) -> None:
    """Append the command as typed to `command.txt`, with its time; whole or not at all, as `cpt resume` reads it."""
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
    path = run_dir / "command.txt"
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomic(path, f"{old}# {when}\n{shlex.join(command)}\n")


def is_fresh(run_dir: Path) -> bool:
    """Whether a run was begun by a command with `--fresh`: nothing in it comes from another run."""
    try:
        lines = (run_dir / "command.txt").read_text(encoding="utf-8").splitlines()
        return any("--fresh" in shlex.split(line) for line in lines[:2] if not line.startswith("#"))
    except (OSError, ValueError):
        return False


def environment(cwd: Path, environ: Mapping[str, str], now: float) -> dict[str, Any]:
    """Versions, machine and code, as they are now."""
    return {
        "time": now,
        "cpt": __version__,
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "cwd": str(cwd),
        "variables": {name: environ[name] for name in VARIABLES if name in environ},
        "git": git_state(cwd),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_state(cwd: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of the repository that `cwd` is in; None when it is in none."""
    root = _git(cwd, "rev-parse", "--show-toplevel")
    commit = _git(cwd, "rev-parse", "HEAD")
    if root is None or commit is None:
        return None
    diff = _git(cwd, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
    cut = len(diff.encode()) > _LONGEST_DIFF
    untracked = (_git(cwd, "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return {
        "root": root.strip(),
        "commit": commit.strip(),
        "diff": diff.encode()[:_LONGEST_DIFF].decode(errors="ignore"),
        "diff_is_cut": cut,
        "untracked": untracked[:1000],
    }


def _git(cwd: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=cwd, capture_output=True, text=True, errors="replace", timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def write_environment(folder: Path, found: Mapping[str, Any]) -> None:
    """`environment.json` of a run or an attempt."""
    write_json(folder / "environment.json", dict(found))


def differences(run_dir: Path, now: Mapping[str, Any]) -> list[str]:
    """What has changed in versions and code since the run's records were written, one sentence each."""
    try:
        before = read_json(run_dir / "environment.json")
    except (OSError, ValueError):
        return []
    found = [
        f"{what} was {before.get(key)} when the run was sent and is {now.get(key)}"
        for key, what in (("cpt", "cpt"), ("python", "Python"))
        if before.get(key) != now.get(key)
    ]
    was, packages = before.get("packages") or {}, now.get("packages") or {}
    found += [f"{n} was {was[n]} when the run was sent and is {v}" for n, v in packages.items() if was.get(n, v) != v]
    old, new = before.get("git") or {}, now.get("git") or {}
    if old and new and (old.get("commit"), old.get("diff")) != (new.get("commit"), new.get("diff")):
        commits = f"{str(old.get('commit'))[:9]} → {str(new.get('commit'))[:9]}"
        same = old.get("commit") == new.get("commit")
        found.append(f"the code in `{new.get('root')}` has changed ({'uncommitted changes' if same else commits})")
    return found


def write_event(run_dir: Path, event: Mapping[str, Any]) -> None:
    """Append one of the orchestrator's events to the run's `events.jsonl`."""
    append_line(run_dir / "events.jsonl", dict(event))
