"""The wrong optimizer state that megatron-core itself saves with several padded buckets is found and named, in time.

megatron-core 0.15.0 to 0.19.2, `fully_reshardable`. The same state saved by us is right.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from cpt.base.errors import UsageError
from cpt.checkpoint import diff, master, verify
from cpt.checkpoint.arrays import Files
from cpt.checkpoint.formats import Reading, Writing
from cpt.checkpoint.formats.torch_dist import TorchDist
from cpt.checkpoint.job import planning
from cpt.checkpoint.job.convert import convert
from cpt.plan.model import ModelConfig, Parallel
from tests.dist.ranks import run_ranks
from tests.dist.test_checkpoint import LLAMA, TIED, Run
from tests.dist.test_convert_torch_dist import saved_by_both

BROKEN = tuple(int(n) for n in version("megatron-core").split(".")[:2]) in {(0, n) for n in range(15, 20)}
CASES = {
    "several buckets": (LLAMA, Parallel(dp=2, overlap_grad_reduce=True)),
    "tied embeddings at pp 2, without overlap": (TIED, Parallel(pp=2, dp=2, layers=(3, 2))),
}


def buckets_and_save(model: ModelConfig, parallel: Parallel, out: str) -> int:
    padded = Run(model, parallel, "bf16").padded_buckets()
    saved_by_both(model, parallel, "fully_reshardable", {}, out)
    return padded


@pytest.fixture(scope="module", params=CASES)
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained state, `ours` and `theirs`."""
    root = tmp_path_factory.mktemp("fault")
    for name in ("ours", "theirs"):
        (root / name).mkdir()
    model, parallel = CASES[request.param]
    padded = run_ranks(parallel, buckets_and_save, model, parallel, str(root))
    assert max(padded) > 0, "no bucket ends in padding: the case shows nothing"
    return root


@pytest.mark.skipif(not BROKEN, reason="this megatron-core saves it right")
def test_the_fault_is_found_and_named(folders: Path) -> None:
    report = verify.inspect(folders / "theirs", workers=2)
    (wrong,) = report.wrong
    assert "the optimizer's main weights are not the model's weights in " in wrong
    assert "megatron-core 0.15.0 to 0.19.2" in wrong and "`fully_reshardable`" in wrong
    # The checksums are of the wrong values: they are no help here.
    assert report.done[1].endswith("B") and "checksums" in report.done[1]
    content = TorchDist.open(folders / "theirs", Reading())
    found = master.check(content, Files())
    assert 0 < len(found) < master.compared(content)
    assert content.optimizer is not None and content.optimizer.form == "fully_reshardable"


@pytest.mark.skipif(not BROKEN, reason="this megatron-core saves it right")
def test_its_optimizer_is_never_converted_and_its_weights_are(folders: Path, tmp_path: Path) -> None:
    request = planning.Request(source=folders / "theirs", out=tmp_path / "out", to="atom")
    with pytest.raises(UsageError, match="main weights are not the model's weights") as raised:
        convert(planning.plan(request))
    assert any("`--optimizer none`" in hint for hint in raised.value.hints)
    assert not (tmp_path / "out").exists()
    weights = planning.Request(
        source=folders / "theirs", out=tmp_path / "weights", to="atom", writing=Writing(optimizer="none")
    )
    convert(planning.plan(weights))
    assert verify.verify(tmp_path / "weights") == []


def test_what_we_save_of_the_same_state_is_right(folders: Path) -> None:
    assert verify.verify(folders / "ours") == []
    ours, theirs = (TorchDist.open(folders / name, Reading()) for name in ("ours", "theirs"))
    assert diff.diff(ours, theirs, Files(), weights=True).tensors == ()
    found = {(d.tensor, d.state) for d in diff.diff(ours, theirs, Files()).tensors}
    wrong = {(w.atom, "fp32") for w in master.check(theirs, Files()) if not w.pad}
    # The master test finds all wrong main weights; moments are wrong in the same tensors.
    assert wrong == {(t.removesuffix(" (padding rows)"), s) for t, s in found if s == "fp32" and "padding" not in t}
    assert {t for t, s in found if s == "exp_avg" and "padding" not in t} <= {t for t, _ in wrong}
