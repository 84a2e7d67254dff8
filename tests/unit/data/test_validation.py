"""Validation windows: whole documents, each token predicted once, the same for every layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpt.base.errors import PlanError
from cpt.data.validation import ValidSet, choose
from cpt.plan.types import DataOptions
from tests.unit.data.made import corpus


def labels(valid: ValidSet) -> list[int]:
    return valid.tokens_NS1[:, 1:][valid.loss_mask_NS > 0].tolist()


@pytest.mark.parametrize("size", [1, 7, 16, 1000])
def test_every_token_of_the_documents_is_a_label_once(tmp_path: Path, size: int) -> None:
    made = corpus(tmp_path / "x", [5], valid=[9, 4, 30, 2, 17])
    valid = ValidSet(made, size, 10**9)
    documents = [made.valid.read(int(d)) for d in choose(made, 10**9)]
    assert labels(valid) == np.concatenate(documents).tolist()
    assert valid.num_tokens == 62 == valid.loss_mask_NS.sum() and valid.num_bytes == 4 * 62
    assert valid.tokens_NS1.shape == (-(-62 // size), size + 1) and valid.num_documents == 5
    assert np.array_equal(valid.tokens_NS1[1:, 0], valid.tokens_NS1[:-1, -1])
    assert valid.tokens_NS1[0, 0] == 0  # EOS stands before the first document


def test_without_eos_the_very_first_token_is_not_predicted(tmp_path: Path) -> None:
    made = corpus(tmp_path / "x", [5], valid=[9, 4], eos=False)
    assert ValidSet(made, 8, 100).num_tokens == 12


def test_the_limit_takes_whole_documents_in_a_fixed_random_order(tmp_path: Path) -> None:
    sizes = [10 + i % 7 for i in range(50)]
    made = corpus(tmp_path / "x", [5], valid=sizes)
    all_of_them, some = choose(made, 10**9).tolist(), choose(made, 200).tolist()
    assert some == all_of_them[: len(some)] and sorted(all_of_them) == list(range(50)) != all_of_them
    taken = sum(sizes[d] for d in some)
    assert taken <= 200 < taken + sizes[all_of_them[len(some)]]
    assert ValidSet(made, 16, 200).num_tokens == taken


def test_one_document_is_taken_even_when_it_is_over_the_limit(tmp_path: Path) -> None:
    made = corpus(tmp_path / "x", [5], valid=[0, 300, 0])
    assert ValidSet(made, 16, 10).num_tokens == 300


def test_nothing_held_out_is_a_clear_error(tmp_path: Path) -> None:
    for number, valid in enumerate(([], [0, 0])):
        with pytest.raises(PlanError, match="no held-out documents"):
            ValidSet(corpus(tmp_path / str(number), [5], valid=valid), 16, 100)


def test_documents_are_kept_apart_when_the_run_does_so(tmp_path: Path) -> None:
    made = corpus(tmp_path / "x", [5], valid=[5, 9, 6])
    valid = ValidSet(made, 8, 100, DataOptions(reset_positions=True, mask_documents=True))
    assert valid.position_ids_NS is not None and valid.segment_ids_NS is not None
    flat = valid.tokens_NS1[:, :-1]
    for row in range(len(valid)):
        position = segment = 0
        for i in range(8):
            inside = row * 8 + i <= 20
            if inside:
                assert (valid.position_ids_NS[row, i], valid.segment_ids_NS[row, i]) == (position, segment)
                # The EOS before the first document is context for it; the others end their own document.
                ended = flat[row, i] == 0 and not (row == 0 and i == 0)
                if row * 8 + i < 20:
                    assert valid.loss_mask_NS[row, i] == (not ended)
                position, segment = (0, segment + 1) if ended else (position + 1, segment)
    assert valid.num_tokens == 18  # the first tokens of the second and third document have no context
    plain = ValidSet(made, 8, 100)
    assert plain.position_ids_NS is None and plain.segment_ids_NS is None
