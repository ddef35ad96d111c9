import os
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test sees the same numbers alone and in company."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real images and masks: `$SAMCACHE_TEST_DATA`, else `shared/data` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SAMCACHE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: set SAMCACHE_TEST_DATA (looked in {folder})")
    return folder
