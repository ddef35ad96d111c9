"""Values of a row <-> the bytes that are stored."""

import numpy as np
import torch
from numcodecs import blosc, zstd

from sam_cache.store.spec import LevelSpec

# Levels beyond 3 cost much more time for about 1% of the size.
COMPRESSION_LEVEL = 3


def codec_metadata(level: LevelSpec) -> list[dict]:
    """The Zarr v3 codecs between `bytes` and `crc32c`."""
    match level.codec:
        case "zstd":
            return [{"name": "zstd", "configuration": {"level": COMPRESSION_LEVEL, "checksum": False}}]
        case "blosc":
            return [
                {
                    "name": "blosc",
                    "configuration": {
                        "cname": "zstd",
                        "clevel": COMPRESSION_LEVEL,
                        "shuffle": "bitshuffle",
                        "typesize": level.stored.itemsize,
                        "blocksize": 0,
                    },
                }
            ]
    return []


def to_stored(value: np.ndarray | torch.Tensor, level: LevelSpec) -> np.ndarray:
    """`value` (C, H, W) of any floating type in storage type, as flat uint8.

    Raises ValueError, with the reason, when a value is not finite or does not fit the type.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.require(value, requirements="W"))
    stored = as_bytes(value.detach().to("cpu", level.stored.torch_dtype).contiguous()).reshape(-1)
    bits = stored.view(f"<u{level.stored.itemsize}")
    magnitude = bits & ((1 << 8 * level.stored.itemsize - 1) - 1)
    # On the CPU this is some thirty times faster than torch.isfinite, which is slow in half precision.
    if magnitude.max() >= level.stored.infinity:
        unfit = f"exceeds {level.dtype}" if torch.isfinite(value).all() else "not finite"
        raise ValueError(f"{unfit}: {(magnitude >= level.stored.infinity).sum()} of {bits.size} values")
    return stored


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous CPU tensor's own memory as uint8; the last axis grows by the item size."""
    return tensor.view(torch.uint8).numpy()


def encode(stored: np.ndarray, level: LevelSpec) -> np.ndarray:
    """Flat uint8 in, flat uint8 out."""
    match level.codec:
        case "zstd":
            data = zstd.Zstd(level=COMPRESSION_LEVEL).encode(stored)
        case "blosc":
            # Bitshuffle works on items, whose size blosc takes from the array's type.
            items = stored.view(f"<u{level.stored.itemsize}")
            data = blosc.Blosc("zstd", COMPRESSION_LEVEL, blosc.BITSHUFFLE).encode(items)
        case _:
            return stored
    return np.frombuffer(data, np.uint8)


def decode(data: np.ndarray, level: LevelSpec, out: np.ndarray) -> None:
    """Decompress `data` into `out`, both flat uint8. For codecs other than raw."""
    if level.codec == "zstd":
        zstd.decompress(data, out)
    else:
        blosc.decompress(data, out)
