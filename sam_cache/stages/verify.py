"""Check a store's bytes against its ledger and checksums."""

import json

from sam_cache.config import VerifyConfig
from sam_cache.stages.progress import Bar, say
from sam_cache.store import verify


def verify_store(cfg: VerifyConfig) -> int:
    """Read every committed byte and say what is whole, missing or damaged; returns 0, or 3 for damage."""
    ...
