"""Random numbers that belong to one object in one epoch, wherever and with whomever it comes up."""

import numpy as np
from numpy.random import Generator, Philox


class KeyedStreams:
    """Streams of one seed, one at a time: each begins where it is asked for.

    (seed, image, epoch, object) are the key and the upper half of the counter of Philox (Salmon et al. 2011), so
    no two objects share a stream: nothing is hashed, nothing collides. One generator is set to one
    stream after the other, since making a generator takes four times as long.
    """

    def __init__(self, seed: int):
        self._seed = int(seed) % 2**64
        self._bits = Philox(0)
        self._generator = Generator(self._bits)

    def at(self, image_id: int, epoch: int, object_id: int) -> Generator:
        """The generator, at the beginning of this stream; the same one at every call."""
        image, *rest = (int(number) % 2**64 for number in (image_id, epoch, object_id))
        place = {"key": (self._seed, image), "counter": (0, 0, *rest)}
        unused = {"buffer": (0, 0, 0, 0), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        self._bits.state = {"bit_generator": "Philox", "state": place, **unused}
        return self._generator

    def words(self, image_id: int, epoch: int, object_id: int, count: int) -> np.ndarray:
        """The first `count` words, uint64, of a stream."""
        self.at(image_id, epoch, object_id)
        return self._bits.random_raw(count)


def keyed_generator(seed: int, epoch: int, image_id: int, object_id: int) -> Generator:
    """A generator of its own for one stream of `KeyedStreams`."""
    words = [int(number) % 2**64 for number in (seed, image_id, epoch, object_id)]
    key, counter = np.array(words[:2], np.uint64), np.array([0, 0, *words[2:]], np.uint64)
    return Generator(Philox(key=key, counter=counter))


def doubles_of(words: np.ndarray) -> np.ndarray:
    """What `Generator.random` makes of words: float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def floats_of(words: np.ndarray) -> np.ndarray:
    """What `Generator.random` of float32 makes of words (P,): two numbers each (P, 2), the lower half's first."""
    halves = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)], axis=1)
    return (halves >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
