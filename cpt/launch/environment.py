"""Which rank a process is, by whoever started it: our launcher, torchrun, or Slurm's srun."""

from __future__ import annotations

import re
from collections.abc import Mapping


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE where they are missing and srun says them in its own words.

    Slurm sets its variables in the batch step as well, which is no rank: only a numbered step counts.
    """
    if "RANK" in environ or not environ.get("SLURM_STEP_ID", "").isdigit() or "SLURM_PROCID" not in environ:
        return {}
    size = environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"]
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environ) or size),
    }


def _tasks_here(environ: Mapping[str, str]) -> int | None:
    """Tasks of the step on this node: srun says `2(x3),1` for four nodes."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            return None
        counts += [int(found[1])] * int(found[2] or 1)
    node = environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None
