"""`cpt doctor`: what is missing before anything fails."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from cpt.cli.flags import Json, result, result_json


def command(json: Json = False) -> int:
    """Check Python, packages, process groups, memory, disk and wandb; exit code 3 when a check fails."""
    from cpt.base.errors import DONE, ENVIRONMENT
    from cpt.doctor import check, machine, packages, tracking

    cache = Path(os.environ.get("CPT_CACHE") or ".cpt/cache").absolute()
    found = check.run(
        [*packages.checks(), *machine.checks(Path("runs").absolute(), cache), *tracking.checks(os.environ)]
    )
    if json:
        result_json([asdict(c) for c in found])
    else:
        width = max(len(c.name) for c in found)
        for c in found:
            result(f"{c.status:<4}  {c.name:<{width}}  {c.found}")
            if c.hint:
                result(f"{'':<{width + 6}}  → {c.hint}")
    return ENVIRONMENT if any(c.status == "fail" for c in found) else DONE
