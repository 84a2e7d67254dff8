"""Where the shared real data lies, for tests that use it when it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared_data(*parts: str) -> Path:
    """`$CPT_SHARED/data/<parts>` or `../shared/data/<parts>` beside the checkout; skips the test when it is missing."""
    root = Path(os.environ.get("CPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    path = root.joinpath("data", *parts)
    if not path.exists():
        pytest.skip(f"shared data not found at {path}; set CPT_SHARED to run this test")
    return path
