"""A published model on real text, stopped at tp 2 x pp 2 and resumed at other layouts: losses against going on there.

    python -m benchmarks.relayout

Needs the shared data (`CPT_SHARED`, or `../shared` beside the checkout).
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.kill_resume import RECIPE, ROOT

STOP_AT, COMPARED, LIMIT = 16, 20, 1e-5  # steps, steps, nats/token
LAYOUTS = {
    "tp 2 x pp 2 (the same)": "{tp: 2, pp: 2, dp: 1}",
    "tp 1 x pp 1": "{tp: 1, pp: 1, dp: 1}",
    "tp 2 x dp 2": "{tp: 2, pp: 1, dp: 2}",
    "pp 2 x dp 2": "{tp: 1, pp: 2, dp: 2}",
}


def main(arguments: list[str] | None = None) -> int:
    """Stop once, resume four times; 1 when a loss is further away than the limit."""
    from tests.dist import killing

    shared = Path(os.environ.get("CPT_SHARED") or ROOT.parent / "shared") / "data"
    if not shared.is_dir():
        print(f"skipped: no shared data in {shared}; set CPT_SHARED")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "recipes").mkdir()
        recipe = RECIPE.format(models=shared / "models", corpora=shared / "corpora")
        (folder / "recipes" / "three.yaml").write_text(recipe)
        runs = killing.Runs(folder)
        only = ["~stages.second", "~stages.anneal"]
        straight = _losses(runs.finish("straight", *only))
        part = runs.start("part", *only)
        part.wait_until(
            lambda: any(e["kind"] == "step" and e["step"] >= STOP_AT for e in part.events("domain")), "the stop"
        )
        part.process.send_signal(signal.SIGINT)
        if part.process.wait(120) != 75:
            print(part.text()[-3000:])
            return 1
        worst = 0.0
        for name, layout in LAYOUTS.items():
            runs_folder = "".join(c for c in name if c.isalnum())
            shutil.copytree(folder / "part", folder / runs_folder)
            resumed = runs.finish(runs_folder, *only, f"stages.domain.parallel={layout}")
            if resumed.process.returncode:
                print(resumed.text()[-3000:])
                return 1
            losses = _losses(resumed)
            steps = sorted(losses)[:COMPARED]
            apart = max(abs(losses[s] - straight[s]) for s in steps)
            worst = max(worst, apart)
            print(f"{name:24} steps {steps[0]} to {steps[-1]}: largest difference {apart:.1e} nats/token", flush=True)
        return int(worst > LIMIT)


def _losses(running) -> dict[int, float]:  # type: ignore[no-untyped-def]
    """Training loss by step of the newest attempt."""
    return {e["step"]: e["loss"] for e in running.events("domain") if e["kind"] == "step"}


if __name__ == "__main__":
    sys.exit(main())
