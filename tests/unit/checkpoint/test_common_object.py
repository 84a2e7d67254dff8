"""torch_dist folders of megatron-core 0.19: what was `common.pt` is an object among the records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpt.base.errors import UsageError
from cpt.checkpoint import find
from cpt.checkpoint.formats import Reading
from cpt.checkpoint.torch_dist import COMMON, COMMON_OBJECT, METADATA, Folder, Record, metadata
from tests.made_checkpoints import content, write


def test_the_common_part_is_read_from_the_object(tmp_path: Path) -> None:
    folder = write(content(tmp_path / "made"), "torch_dist", tmp_path / "out")
    (folder / "manifest.json").unlink()
    megatron = find.known()["torch_dist"]
    before = megatron.open(folder, Reading())
    common = torch.load(folder / COMMON, weights_only=False)
    torch.save([common], folder / "__9_0.distcp")
    source = Folder(folder)
    records = [r for t in source.tensors.values() for r in t.chunks] + list(source.objects.values())
    size = (folder / "__9_0.distcp").stat().st_size
    records.append(Record(COMMON_OBJECT, None, (), (), "", "__9_0.distcp", 0, size))
    (folder / METADATA).write_bytes(metadata(records))
    (folder / COMMON).unlink()
    after = megatron.open(folder, Reading())
    assert (after.model, after.optimizer, after.args) == (before.model, before.optimizer, before.args)
    assert after.atoms.keys() == before.atoms.keys() and after.left_out == before.left_out
    assert megatron.facts(folder)["optimizer"] == "fully_reshardable"
    (folder / METADATA).write_bytes(metadata(records[:-1]))
    with pytest.raises(UsageError, match=r"common\.pt` is missing"):
        megatron.open(folder, Reading())
