"""What the report says, as data: `cpt report --json`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.report import law_outcome
from cpt.report.history import read_run


def report_json(run_dir: Path) -> dict[str, Any]:
    """Losses after each stage, changes, transfer measures and gaps of a run."""
    run = read_run(run_dir)
    account = run.account
    matrix = account.matrix
    measures: dict[str, Any] = {}
    if matrix is not None:
        names = ("overall", "backward_transfer", "forward_transfer", "forgetting", "forgetting_of_older")
        for name in (*names, "learned_loss", "retained_loss"):
            measures[name] = asdict(getattr(matrix, name)())
        measures["fuar"] = matrix.fuar()
    return {
        "run": run.plan.name,
        "plan": run.plan.id,
        "stages": {name: state.status for name, state in run.states.items()},
        "chain": list(account.chain),
        "against": account.before,
        "losses": [
            {
                "after": row.stage,
                "at": row.at,
                "provisional": row.provisional,
                "losses": {d: asdict(x) for d, x in row.losses.items()},
            }
            for row in account.rows
        ],
        "also_measured": [
            {"after": row.stage, "what": row.what, "losses": {d: asdict(x) for d, x in row.losses.items()}}
            for row in account.beside
        ],
        "changes": [
            {
                "domain": c.domain,
                "role": c.role,
                "before": c.before.loss,
                "after": c.after.loss,
                "nats_per_token": c.nats,
                "bits_per_byte": c.bits_per_byte,
                "noise": c.noise,
                "verdict": c.verdict,
            }
            for c in account.changes
        ],
        "measures": measures,
        "problem": account.problem,
        "law_stages": [outcome.to_json() for outcome in law_outcome.outcomes(run)],
        "gaps": {stage: {d: asdict(gap) for d, gap in gaps.items()} for stage, gaps in account.gaps.items()},
    }
