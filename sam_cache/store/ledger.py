"""The commit ledger: JSON records that say what the store holds, each sealed by its own digest.

    prepare-000000.json   segment of images, digests of every file that `prepare` wrote
    shard-000000.json     states, content hashes, extents and digests of one shard, every level
    objects-NAME.json     where object set NAME stands, once it was added or replaced
    compact.json          shard records gathered as columns; see `sam_cache.store.shard_records`

Readers trust these records, never the presence of a file: Zarr reads a missing shard as fill
values without a word. Paths in records are relative to the store, with forward slashes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from sam_cache.errors import DamageError
from sam_cache.store.spec import Shard

NAMES = re.compile(r"(prepare|shard|objects)-([\w-]+)\.json")

Report = Callable[[str], None]


@dataclass
class Ledger:
    """All records but those of shards: `prepares` by segment, `objects` by set name."""

    prepares: dict[int, dict] = field(default_factory=dict)
    objects: dict[str, dict] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return max(record["rows"] for record in self.prepares.values())

    def list_shards(self, shard_rows: int) -> list[Shard]:
        """Every shard the store has or will have. A segment of images begins with a new one."""
        shards = []
        for _, record in sorted(self.prepares.items()):
            stop = record["first_row"] + record["images"]
            for first in range(record["first_row"], stop, shard_rows):
                shards.append(Shard(first // shard_rows, range(first, min(first + shard_rows, stop))))
        return shards

    def parts(self, name: str) -> list[str]:
        """Folders that together are object set `name`, oldest images first."""
        replaced = self.objects.get(name)
        first, parts = (replaced["segments"], [replaced["part"]]) if replaced else (0, [])
        later = [record["objects"].get(name) for k, record in sorted(self.prepares.items()) if k >= first]
        return [f"objects/{name}/{part}" for part in [*parts, *(part for part in later if part)]]

    def object_sets(self) -> list[str]:
        return sorted({*self.objects, *(name for record in self.prepares.values() for name in record["objects"])})

    def files(self) -> dict[str, list]:
        """Every file outside the shards -> [size, sha256]; a later record speaks for a shared file."""
        files = {}
        for record in [*(record for _, record in sorted(self.prepares.items())), *self.objects.values()]:
            files |= record["files"]
        current = {part for name in self.object_sets() for part in self.parts(name)}
        return {path: entry for path, entry in files.items() if _object_part(path) in {None, *current}}


def seal(record: dict) -> bytes:
    """Canonical JSON, with the sha256 of that JSON added as its last entry, `digest`."""
    text = _canonical(record)
    return text[:-1] + _seal_of(text)


def _seal_of(text: bytes) -> bytes:
    return b',"digest":"%b"}' % hashlib.sha256(text).hexdigest().encode()


_SEAL_BYTES = len(_seal_of(b""))


def unseal(data: bytes) -> dict:
    """The record, its digest included; ValueError unless `data` is byte for byte what was sealed."""
    text, digest = data[:-_SEAL_BYTES] + b"}", data[-_SEAL_BYTES:]
    # Compared as bytes: to write the record anew and compare that would take longer than to parse it.
    if digest != _seal_of(text):
        raise ValueError("the record does not match its digest")
    return msgspec.json.decode(data)


def damage(root: Path, text: str) -> DamageError:
    return DamageError(f"{root}: {text}; see what is left with `samcache verify --store {root}`")


def refusal(root: Path) -> Report:
    """A report that raises what it is told as DamageError."""

    def refuse(text: str) -> None:
        raise damage(root, text)

    return refuse


def read_ledger(root: Path, report: Report | None = None) -> Ledger:
    """Read every record of the store at `root` but those of shards.

    A record that is damaged goes to `report` and is left out; without `report` it is a
    DamageError.
    """
    report = report or refusal(root)
    ledger = Ledger(dict(read_records(root, "prepare", report)), dict(read_records(root, "objects", report)))
    for segment in range(max(ledger.prepares, default=0)):
        if segment not in ledger.prepares:
            report(f"ledger/{record_name('prepare', segment)} is missing")
    return ledger


def read_records(root: Path, kind: str, report: Report) -> Iterator[tuple[int | str, dict]]:
    """Key and record of every record of a kind."""
    for name in sorted(os.listdir(root / "ledger")):
        match = NAMES.fullmatch(name)
        if match and match[1] == kind and (record := read_record(root / "ledger" / name, report)):
            if name == record_name(kind, record["key"]):
                yield record["key"], record
            else:
                report(f"ledger/{name} is the record of {record['key']!r}")


def read_record(path: Path, report: Report) -> dict | None:
    """One record; None where there is none, or where it is damaged and `report` returns."""
    try:
        return unseal(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        report(f"ledger/{path.name} is not the record that was committed")
        return None


def record_name(kind: str, key: int | str) -> str:
    return f"{kind}-{key:06d}.json" if isinstance(key, int) else f"{kind}-{key}.json"


def digests(root: Path) -> dict[str, list]:
    """Path relative to `root` -> [size, sha256] of every file under it."""
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): digest(path) for path in paths}


def digest(path: Path) -> list:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def changed(root: Path, files: dict[str, list]) -> Iterator[str]:
    """What is wrong with each of `files` that is not, byte for byte, what was committed."""
    for name, committed in files.items():
        if not (root / name).is_file():
            yield f"{name} is missing"
        elif digest(root / name) != committed:
            yield f"{name} is not what was committed"


def _object_part(path: str) -> str | None:
    """The part `objects/NAME/PART` that a file belongs to, if it does."""
    steps = path.split("/")
    return "/".join(steps[:3]) if steps[0] == "objects" and len(steps) > 3 else None


def _canonical(record: dict) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
