"""Which rank a process is, by whoever started it: our launcher, torchrun, or Slurm's srun."""

from __future__ import annotations

from collections.abc import Mapping


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE and LOCAL_RANK where they are missing and srun says them in its own words.

    Slurm sets its variables in the batch step as well, which is no rank: only a numbered step counts.
    """
    if "RANK" in environ or not environ.get("SLURM_STEP_ID", "").isdigit() or "SLURM_PROCID" not in environ:
        return {}
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
    }
