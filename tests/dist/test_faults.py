"""A few faults of different kinds against runs that are gone on with; `benchmarks/faults.py` does many."""

from __future__ import annotations

import random
from pathlib import Path

from tests.dist import faulting, killing


def test_runs_under_faults_of_all_kinds_end_as_the_one_without(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "three.yaml").write_text(faulting.recipe("{dp: 2}", (30, 20, 10)))
    killing.write_topics(tmp_path)
    runs = killing.Runs(tmp_path)
    straight = runs.finish("straight")
    assert straight.process.returncode == 0, straight.text()[-4000:]
    chance = random.Random(11)
    kinds = ["corpus", "rank", "damage", "disk", "stopped", "command"]
    options = (f"launcher.hang_after={faulting.HANG_AFTER}", "launcher.retries=2")
    number = 0
    while kinds:  # a run may be done before the moment of a fault has come
        number += 1
        name = f"run{number}"
        with faulting.small_disk(tmp_path / name) as has_disk:
            run = faulting.Faulted(runs, name, chance, options)
            try:
                if not has_disk:
                    kinds = ["parent" if kind == "disk" else kind for kind in kinds]
                while kinds and (fault := run.fault(kinds[-1])) is not None:
                    kinds.pop()
                    print(fault.text())
                    assert not fault.wrong, fault.text()
                run.finish()
                assert run.done and run.problems == []
                assert faulting.differences(runs, name) == []
            finally:
                run.end()
