"""Fixtures that several test files share."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recordings and real scenes beside the repository; a stranger's clone has none."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared (recordings, real scenes) is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def recorded() -> Path:
    """Small recordings that ship with the tests."""
    return Path(__file__).parent / "recorded"
