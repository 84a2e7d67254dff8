"""A published model on real text, stopped at tp 2 x pp 2 and resumed at other layouts: losses against going on there.

    python -m benchmarks.relayout

Each layout goes on twice: from the checkpoint as it is, and from one that was converted to `atom` and back for that
layout, optimizer included.

Needs the shared data (`CPT_SHARED`, or `../shared` beside the checkout).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.kill_resume import RECIPE, ROOT

STOP_AT, COMPARED, LIMIT = 16, 20, 1e-6  # steps, steps, nats/token
LAYOUTS = ((2, 2, 1), (1, 1, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (4, 1, 1))  # tp, pp, dp; first as it was stopped


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
        for tp, pp, dp in LAYOUTS:
            for through_atom in (False, True):
                name = f"tp {tp} x pp {pp} x dp {dp}{' through atom' if through_atom else ''}"
                runs_folder = "".join(c for c in name if c.isalnum())
                shutil.copytree(folder / "part", folder / runs_folder)
                if through_atom:
                    _through_atom(folder / runs_folder / "it" / "stages" / "domain" / "checkpoints", tp, pp)
                layout = f"stages.domain.parallel={{tp: {tp}, pp: {pp}, dp: {dp}}}"
                resumed = runs.finish(runs_folder, *only, layout)
                if resumed.process.returncode:
                    print(resumed.text()[-3000:])
                    return 1
                losses = _losses(resumed)
                steps = sorted(losses)[:COMPARED]
                apart = max(abs(losses[s] - straight[s]) for s in steps)
                worst = max(worst, apart)
                print(
                    f"{name:32} steps {steps[0]} to {steps[-1]}: largest difference {apart:.1e} nats/token", flush=True
                )
        return int(worst > LIMIT)


def _through_atom(checkpoints: Path, tp: int, pp: int) -> None:
    """Put a folder's newest checkpoint into `atom` and back for a layout (of any dp); nothing of the old ones stays."""
    from cpt.checkpoint import store

    newest, _ = store.newest_whole(checkpoints)
    atom, back = checkpoints.parent / "atom", checkpoints.parent / "back"
    for command in (
        [str(newest), str(atom), "--to", "atom"],
        [str(atom), str(back), "--to", "torch_dist", f"--tp={tp}", f"--pp={pp}"],
    ):
        subprocess.run([sys.executable, "-m", "cpt", "convert-ckpt", *command], check=True, capture_output=True)
    shutil.rmtree(checkpoints)
    back.rename(checkpoints)
    shutil.rmtree(atom)


def _losses(running) -> dict[int, float]:  # type: ignore[no-untyped-def]
    """Training loss by step of the newest attempt."""
    return {e["step"]: e["loss"] for e in running.events("domain") if e["kind"] == "step"}


if __name__ == "__main__":
    sys.exit(main())
