"""Fixtures of the data tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tmp(tmp_path_factory: pytest.TempPathFactory) -> pytest.TempPathFactory:
    """`tmp_path_factory` under a short name."""
    return tmp_path_factory
