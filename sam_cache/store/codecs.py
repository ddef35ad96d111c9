"""Values of a row <-> the bytes that are stored."""

import numpy as np
import torch
from numcodecs import blosc, zstd

from sam_cache.quantisation import quantise
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


def to_stored(value: np.ndarray | torch.Tensor, name: str, level: LevelSpec) -> dict[str, np.ndarray]:
    """`value` (C, H, W) of any floating type as what each of the level's arrays holds of it, flat uint8.

    Raises ValueError, with the reason, when a value is not finite or does not fit the type.
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.require(value, requirements="W"))
    value = value.detach()
    if level.dtype != "int8":
        return {name: _to_float_bytes(value, level)}
    try:
        parts = quantise(value)
    except ValueError:
        raise _unfit(value, "fp32", int((~torch.isfinite(value.float())).sum())) from None
    return {array: _to_bytes(part) for array, part in zip(level.arrays(name), parts, strict=True)}


def _to_float_bytes(value: torch.Tensor, level: LevelSpec) -> np.ndarray:
    stored = _to_bytes(value.to("cpu", level.stored.torch_dtype))
    _expect_finite(stored, value, level)
    if level.keep_bits is None:
        return stored
    rounded = round_mantissa(stored, level)
    _expect_finite(rounded, value, level)
    return rounded


def _expect_finite(stored: np.ndarray, value: torch.Tensor, level: LevelSpec) -> None:
    """Raises ValueError where `stored`, made of `value`, is not finite throughout."""
    bits, size = stored.view(f"<u{level.stored.itemsize}"), 8 * level.stored.itemsize
    # As unsigned numbers negative values follow all positive ones, as signed ones they precede them: the largest
    # of each tells, where torch.isfinite is slow in half precision and a mask would be fresh memory for every row.
    negative, infinity = 1 << size - 1, level.stored.infinity
    if bits.max() >= negative + infinity or bits.view(f"<i{level.stored.itemsize}").max() >= infinity:
        raise _unfit(value, level.dtype, int(((bits & (negative - 1)) >= infinity).sum()))


def round_mantissa(stored: np.ndarray, level: LevelSpec) -> np.ndarray:
    """Values with `level.keep_bits` bits of their mantissa left, rounded half to even; flat uint8, finite values.

    What is cut off is zero, which is what a codec makes short work of. As `numcodecs.BitRound` does, but done before
    writing, so that any reader of Zarr can read what it leaves (Kloewer et al. 2021,
    https://doi.org/10.1038/s43588-021-00156-2). The largest values may become infinite.
    """
    cut = level.stored.mantissa - level.keep_bits
    if cut == 0:
        return stored
    bits = stored.view(f"<u{level.stored.itemsize}")
    one = bits.dtype.type(1)
    rounded = bits >> bits.dtype.type(cut)
    rounded &= one  # to even: halves go up only from an odd last bit
    rounded += bits
    rounded += bits.dtype.type((1 << cut - 1) - 1)
    rounded &= bits.dtype.type(-(1 << cut) % (1 << 8 * bits.dtype.itemsize))
    return rounded.view(np.uint8)


def _unfit(value: torch.Tensor, dtype: str, count: int) -> ValueError:
    reason = f"exceeds {dtype}" if torch.isfinite(value).all() else "not finite"
    return ValueError(f"{reason}: {count} of {value.numel()} values")


def _to_bytes(tensor: torch.Tensor) -> np.ndarray:
    return as_bytes(tensor.cpu().contiguous()).reshape(-1)


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
