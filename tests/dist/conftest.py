"""Marks every test of this folder `dist` and gives them `run_ranks` as a fixture of the same name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.dist import ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here starts ranks."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.dist)


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """See `tests.dist.ranks.run_ranks`."""
    return ranks.run_ranks
