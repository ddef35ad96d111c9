"""Check a store's bytes against its ledger and checksums."""

import json

from sam_cache.config import VerifyConfig
from sam_cache.errors import DamageError
from sam_cache.stages.progress import Bar, say
from sam_cache.store import VerifyReport, verify


def verify_store(cfg: VerifyConfig) -> int:
    """Read every committed byte and say what is whole, missing or damaged; returns 0, or 3 for damage."""
    with Bar("verifying", 0, "bytes") as bar:
        report = verify(cfg.store, progress=bar.show, repair=cfg.repair, retry_failed=cfg.retry_failed)
    if cfg.as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        describe(cfg, report)
    return 0 if report.ok else DamageError.exit_code


def describe(cfg: VerifyConfig, report: VerifyReport) -> None:
    for level, row, file in report.damaged_rows:
        say(f"damaged: row {row} of level {level}, in {file}")
    for damage in report.damage:
        say(f"damage: {damage}")
    for name in report.orphans:
        say(f"not recorded: {name}; the next embed run takes it over or refuses it")
    if report.uncommitted:
        say(f"{len(report.uncommitted)} shards are not committed yet; the same embed command goes on with them")
    if report.repaired:
        say(f"dropped {len(report.repaired)} shards; run the same embed command to make them again")
    verdict = "whole" if report.ok else f"{len(report.damage)} damages found"
    if report.damage and not cfg.repair:
        verdict += "; drop damaged shards with --repair"
    print(
        f"{cfg.store}: {verdict}; {report.rows_ok} rows ok, {report.rows_failed} failed, {report.shards} shards, "
        f"{report.bytes / 2**20:.1f} MiB read"
    )
