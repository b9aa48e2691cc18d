"""One sandbox for all tests of hostile input."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.robustness.hostile import seed_case

if sys.platform.startswith("linux"):
    from tests.robustness.sandbox import Sandbox


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Return a sandbox with a cap on memory; a seed input was accepted in it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the sandbox needs Linux")
    with Sandbox(tmp_path_factory.mktemp("sandbox") / "work") as box:
        box.measure_cap(seed_case())
        yield box
