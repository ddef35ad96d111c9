"""What a store is: the identity that is compared whenever it is opened again."""

from dataclasses import asdict, dataclass
from math import prod
from typing import NamedTuple

import torch

from sam_cache.quantisation import COMPANIONS

# What is written. 1 and 2 are read too: their ledgers gather records as JSON, with a sha256 of every shard file; 1 has
# neither int8 levels nor other views than the image itself, 2 no rounded mantissas.
FORMAT = 3
CODECS = ("raw", "zstd", "blosc")
IDENTITY = "identity"


class StoredType(NamedTuple):
    """How values of a level lie on disk. `zarr_name` and `fill_value` are Zarr v3 metadata.

    bf16 is stored as the uint16 of its bits, since no two Zarr libraries agree on that type.
    The fill value is NaN (for bf16 its bit pattern), so a hole never reads as plausible zeros; for int8
    it is the one number that no row holds, and the NaN of its companions makes the product NaN.
    `infinity` are the bits of +inf: those of every finite value, without the sign, are less. `mantissa` is the
    number of bits behind the point.
    """

    zarr_name: str
    fill_value: str | int
    torch_dtype: torch.dtype
    itemsize: int
    infinity: int | None
    mantissa: int


STORED_TYPES = {
    "fp16": StoredType("float16", "NaN", torch.float16, 2, 0x7C00, 10),
    "fp32": StoredType("float32", "NaN", torch.float32, 4, 0x7F800000, 23),
    "bf16": StoredType("uint16", 0x7FC0, torch.bfloat16, 2, 0x7F80, 7),
    "int8": StoredType("int8", -128, torch.int8, 1, None, 0),
}


@dataclass(frozen=True)
class LevelSpec:
    """One cached tensor of the encoder: (channels, height, width) per row.

    `dtype` is a key of `STORED_TYPES`, `codec` one of `CODECS`. A crc32c follows every row
    whatever the codec. An int8 level is three arrays, see `sam_cache.quantisation`; its companions
    are fp32 and raw, whatever the level's codec. Of floating values only `keep_bits` bits of the mantissa are kept
    where that is given, so that a codec makes them smaller.
    """

    channels: int
    height: int
    width: int
    dtype: str
    codec: str = "raw"
    keep_bits: int | None = None

    def __post_init__(self):
        if self.dtype not in STORED_TYPES:
            raise ValueError(f"dtype {self.dtype!r}: choose one of {', '.join(STORED_TYPES)}")
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec!r}: choose one of {', '.join(CODECS)}")
        if self.keep_bits is not None and not 1 <= self.keep_bits <= self.stored.mantissa:
            have = f"1 to {self.stored.mantissa} can be kept" if self.stored.mantissa else "it has no mantissa"
            raise ValueError(f"keep_bits {self.keep_bits} of {self.dtype}: {have}")

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    @property
    def stored(self) -> StoredType:
        return STORED_TYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of one decoded row, without the companions of int8: those are in `StoreSpec.row_bytes`."""
        return prod(self.shape) * self.stored.itemsize

    def arrays(self, name: str) -> "dict[str, LevelSpec]":
        """The Zarr arrays that hold a level called `name`: itself and, for int8, its companions."""
        names = [f"{name}_{companion}" for companion in COMPANIONS] if self.dtype == "int8" else []
        return {name: self, **{each: LevelSpec(self.channels, 1, 1, "fp32") for each in names}}


@dataclass(frozen=True)
class StoreSpec:
    """A store's identity: two runs may share a store only if all of this is equal.

    `preprocessing` is flat: whatever decides how an image becomes the encoder's input. `views` says which
    views of every image have a row, in the words of whoever asked for them. Raises ValueError for a level
    that is called like the scale or offset of another.
    """

    encoder: str
    encoder_sha256: str
    levels: dict[str, LevelSpec]
    compute_dtype: str
    preprocessing: dict[str, str | int | float]
    shard_rows: int = 64
    views: str = IDENTITY

    def __post_init__(self):
        for name, level in self.levels.items():
            if taken := [array for array in level.arrays(name) if array != name and array in self.levels]:
                raise ValueError(f"level {taken[0]}: this is how int8 level {name} calls its own array; rename it")

    @property
    def arrays(self) -> dict[str, LevelSpec]:
        """Every array on disk that holds levels: one per level, three where it is int8."""
        return {array: spec for name, level in self.levels.items() for array, spec in level.arrays(name).items()}

    @property
    def row_bytes(self) -> dict[str, int]:
        """Bytes of one decoded row of each level, with its companions."""
        return {name: sum(array.nbytes for array in level.arrays(name).values()) for name, level in self.levels.items()}

    def to_json(self) -> dict:
        return self._fields() | {"format": FORMAT}

    def _fields(self) -> dict:
        """All of it, less what formats 1 and 2 do not say of a level."""
        fields = asdict(self)
        for level in fields["levels"].values():
            if level["keep_bits"] is None:
                del level["keep_bits"]
        return fields

    @classmethod
    def from_json(cls, record: dict) -> "StoreSpec":
        levels = {name: LevelSpec(**level) for name, level in record["levels"].items()}
        return cls(**{name: value for name, value in record.items() if name != "format"} | {"levels": levels})

    def differences(self, other: "StoreSpec") -> list[str]:
        """One text per field that differs: its dotted name, this spec's value, the other's."""
        ours, theirs = _flat(self._fields()), _flat(other._fields())
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
