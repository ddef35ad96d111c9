"""What a store is: the identity that is compared whenever it is opened again."""

from dataclasses import asdict, dataclass
from math import prod
from typing import NamedTuple

import torch

FORMAT = 1
CODECS = ("raw", "zstd", "blosc")


class StoredType(NamedTuple):
    """How values of a level lie on disk. `zarr_name` and `fill_value` are Zarr v3 metadata.

    bf16 is stored as the uint16 of its bits, since no two Zarr libraries agree on that type.
    The fill value is NaN (for bf16 its bit pattern), so a hole never reads as plausible zeros.
    `infinity` are the bits of +inf: those of every finite value, without the sign, are less.
    """

    zarr_name: str
    fill_value: str | int
    torch_dtype: torch.dtype
    itemsize: int
    infinity: int


STORED_TYPES = {
    "fp16": StoredType("float16", "NaN", torch.float16, 2, 0x7C00),
    "fp32": StoredType("float32", "NaN", torch.float32, 4, 0x7F800000),
    "bf16": StoredType("uint16", 0x7FC0, torch.bfloat16, 2, 0x7F80),
}


@dataclass(frozen=True)
class LevelSpec:
    """One cached tensor of the encoder: (channels, height, width) per row.

    `dtype` is a key of `STORED_TYPES`, `codec` one of `CODECS`. A crc32c follows every row
    whatever the codec.
    """

    channels: int
    height: int
    width: int
    dtype: str
    codec: str = "raw"

    def __post_init__(self):
        if self.dtype not in STORED_TYPES:
            raise ValueError(f"dtype {self.dtype!r}: choose one of {', '.join(STORED_TYPES)}")
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec!r}: choose one of {', '.join(CODECS)}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def stored(self) -> StoredType:
        return STORED_TYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of one decoded row."""
        return prod(self.shape) * self.stored.itemsize


@dataclass(frozen=True)
class StoreSpec:
    """A store's identity: two runs may share a store only if all of this is equal.

    `preprocessing` is flat: whatever decides how an image becomes the encoder's input.
    """

    encoder: str
    encoder_sha256: str
    levels: dict[str, LevelSpec]
    compute_dtype: str
    preprocessing: dict[str, str | int | float]
    shard_rows: int = 64
    format: int = FORMAT

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict) -> "StoreSpec":
        levels = {name: LevelSpec(**level) for name, level in record["levels"].items()}
        return cls(**{**record, "levels": levels})

    def differences(self, other: "StoreSpec") -> list[str]:
        """One text per field that differs: its dotted name, this spec's value, the other's."""
        ours, theirs = _flat(self.to_json()), _flat(other.to_json())
        return [
            f"{name}: {ours.get(name, 'absent')!r} != {theirs.get(name, 'absent')!r}"
            for name in ours | theirs
            if ours.get(name) != theirs.get(name)
        ]


@dataclass(frozen=True)
class Shard:
    """The unit of writing: shard `index` and those of its rows that belong to an image."""

    index: int
    rows: range


def _flat(record: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
