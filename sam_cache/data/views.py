"""Other pictures of one image, each with a row of its own in a store: mirrored, jittered, in tiles.

Behind a cache this is all the augmentation there is, so it is decided once, by image and number: the same
on every machine and in every run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator
from torchvision import tv_tensors

from sam_cache.data.crops import MaskCrop, crop_rle
from sam_cache.data.move import Move, as_array, as_picture
from sam_cache.data.rle import mask_to_rle, measure_rle
from sam_cache.data.streams import keyed_generator
from sam_cache.errors import ImageError, UsageError
from sam_cache.types import IDENTITY_TRANSFORM, ImageRecord

KINDS = {"identity": "identity", "hflip": "hflip", "lsj": "lsj:4", "tile": "tile:1024:128"}  # and how to write them
SYNTAX = {"lsj": re.compile(r"(\d+)"), "tile": re.compile(r"(\d+):(\d+)")}

SCALES = (0.1, 2.0)  # of large-scale jittering: Ghiasi et al. 2021, and HQ-SAM's train/utils/dataloader.py
MIRRORED = 0.5  # of the jittered views, as in HQ-SAM
SEED, JITTERING = 0, -3  # chance of views belongs to no run and to no object; -1 and -2 key that of batches


@dataclass(frozen=True, slots=True)
class View:
    """One view of an image of `height` x `width` pixels, called as in `types.ImageRecord.view`.

    Names are `identity`, `hflip`, and numbered from 0 `lsj/0` and `tile/0`. `move` is None for `identity`,
    and for any view of an image whose size is not known: that cannot be shown. `path` is for messages.
    """

    name: str
    height: int = 0
    width: int = 0
    move: Move | None = None
    path: str = ""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    @property
    def transform(self) -> tuple[float, float, float, float, float, float]:
        """Where a place of the image lies in the view, as in `types.ImageRecord`."""
        return self.move.transform(self.height, self.width) if self.move else IDENTITY_TRANSFORM

    def record(self, record: ImageRecord) -> ImageRecord:
        """The image's record as that of this view."""
        height, width = self.move.canvas if self.move else (record.height, record.width)
        return replace(record, height=height, width=width, view=self.name, transform=self.transform)

    def show(self, image: np.ndarray) -> np.ndarray:
        """The view of an image (H, W, 3), uint8 RGB; it may be the given array.

        Raises ImageError where the image's size was not known.
        """
        if self.move is None and self.name != "identity":
            raise ImageError(
                f"{self.path}: has no view {self.name}, since its record has no size; give it height and width"
            )
        return image if self._rests else as_array(self.move.apply(as_picture(image)))

    def carry(
        self,
        rle: bytes,
        box_xywh_image: tuple[float, float, float, float] | None = None,
        crop: Callable[[], MaskCrop] | None = None,
    ) -> bytes | None:
        """The mask of an object in the view; None where no pixel of it is left.

        `rle` are run lengths at the image's size, with a pixel at least; those returned are at the view's.
        Who asks several views about one object gives its tight box, and `crop` that makes its `crop_rle` once
        for all of them: it is called only where the box reaches into the view.
        """
        if self._rests:
            return rle
        # Most objects of an image lie outside of most of its tiles, and to decode one costs more than all else.
        if not self._meets(measure_rle(rle, self.height, self.width)[0] if box_xywh_image is None else box_xywh_image):
            return None
        found = crop() if crop else crop_rle(rle, self.height, self.width)
        piece, left = found.mask, found.left
        if self.move.mirror:
            piece, left = piece[:, ::-1], self.width - left - piece.shape[1]
        top, first, rows, columns = self.move.window
        above, before = max(0, top - found.top), max(0, first - left)
        piece = piece[above : max(0, top + rows - found.top), before : max(0, first + columns - left)]
        if not piece.any():
            return None
        below, right = max(0, found.top - top), max(0, left - first)
        mask = np.zeros((rows, columns), np.uint8)
        mask[below : below + piece.shape[0], right : right + piece.shape[1]] = piece
        if self.move.size != (rows, columns) or self.move.size != self.move.canvas:
            rest = replace(self.move, mirror=False, window=(0, 0, rows, columns))
            mask = _apply(rest, mask)
        return mask_to_rle(mask) if mask.any() else None

    def cuts(self, box_xywh_image: tuple[float, float, float, float]) -> bool:
        """Whether an object with this tight box reaches beyond what the view shows of the image."""
        if self.move is None:
            return False
        left, top, right, bottom = self._in_window(box_xywh_image)
        return left < 0 or top < 0 or right > self.move.window[3] or bottom > self.move.window[2]

    def _meets(self, box_xywh_image: tuple[float, float, float, float]) -> bool:
        left, top, right, bottom = self._in_window(box_xywh_image)
        return left < self.move.window[3] and top < self.move.window[2] and right > 0 and bottom > 0

    def _in_window(self, box_xywh_image: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
        """The sides of a box, counted from the window's upper left corner."""
        x, y, w, h = box_xywh_image
        if self.move.mirror:
            x = self.width - x - w
        top, left, _, _ = self.move.window
        return x - left, y - top, x - left + w, y - top + h

    @property
    def _rests(self) -> bool:
        return self.move is None or self.move.rests(self.height, self.width)


WHOLE = View("identity")  # the image itself, whatever its size


@dataclass(frozen=True)
class Views:
    """Which views every image has; `str` gives the text that parses to it.

    `lsj` is the number of jittered ones, `tile` the side of a tile and the overlap of neighbours, both in
    pixels of the image.
    """

    identity: bool = False
    hflip: bool = False
    lsj: int = 0
    tile: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [name for name in ("identity", "hflip") if getattr(self, name)]
        parts += [f"lsj:{self.lsj}"] if self.lsj else []
        parts += [f"tile:{self.tile[0]}:{self.tile[1]}"] if self.tile else []
        return ",".join(parts)

    @property
    def first(self) -> str:
        """The name of every image's first view."""
        return next(name for name in ("identity", "hflip", "lsj/0", "tile/0") if self.has(name))

    def has(self, name: str) -> bool:
        """Whether a view of this name is among them, if the image is large enough for that many tiles."""
        kind, _, number = name.partition("/")
        return int(number) < self.lsj if kind == "lsj" else bool(getattr(self, kind))

    def lacks(self, asked: "Views") -> list[str]:
        """The kinds of `asked` that are not all here, as one writes them."""
        lacking = [name for name in ("identity", "hflip") if getattr(asked, name) and not getattr(self, name)]
        lacking += [f"lsj:{asked.lsj}"] if asked.lsj > self.lsj else []
        return lacking + ([f"tile:{asked.tile[0]}:{asked.tile[1]}"] if asked.tile not in (None, self.tile) else [])

    def count(self, height: int, width: int) -> int:
        """How many views an image of `height` x `width` pixels has, told without making any; 0 is an unknown size."""
        tiles = 0
        if self.tile:
            tiles = _steps(height, *self.tile) * _steps(width, *self.tile) if height * width else 1
        return self.identity + self.hflip + self.lsj + tiles

    def of(self, record: ImageRecord) -> list[View]:
        """The views of one image, in the order of their rows."""
        height, width = record.height, record.width
        if not height * width:
            names = ["identity", "hflip", *(f"lsj/{number}" for number in range(self.lsj)), "tile/0"]
            return [View(name, path=record.path) for name in names if self.has(name)]
        everything = 0, 0, height, width
        views = [View("identity", height, width)] if self.identity else []
        if self.hflip:
            views.append(View("hflip", height, width, _plain_move(True, everything)))
        for number in range(self.lsj):
            move = _jitter(height, width, keyed_generator(SEED, number, record.id, JITTERING))
            views.append(View(f"lsj/{number}", height, width, move))
        if self.tile:
            views += _tiles(height, width, *self.tile)
        return views


def parse_views(text: str) -> Views:
    """Read `identity`, or several such as `identity,hflip,lsj:4,tile:1024:128`; their order does not matter.

    Raises UsageError that names the part and what was probably meant.
    """
    chosen: dict = {}
    for part in map(str.strip, text.split(",")):
        name, colon, value = part.partition(":")
        if name not in KINDS:
            nearest = get_close_matches(name, KINDS, n=1, cutoff=0)[0]
            known = ", ".join(KINDS.values())
            raise UsageError(f"views {part!r}: unknown; did you mean {nearest}? Views: {known}")
        if name in chosen:
            raise UsageError(f"views {part!r}: {name} is given twice; leave one out")
        if name not in SYNTAX:
            if colon:
                raise UsageError(f"views {part!r}: takes no number; write {name}")
            chosen[name] = True
            continue
        found = SYNTAX[name].fullmatch(value)
        if not found:
            raise UsageError(f"views {part!r}: write it such as {KINDS[name]}")
        first, *rest = map(int, found.groups())
        if not first:
            raise UsageError(f"views {part!r}: 0 of it is none; leave it out, or write such as {KINDS[name]}")
        if rest and rest[0] >= first:
            raise UsageError(f"views {part!r}: neighbours overlap by less than a tile; write such as {KINDS[name]}")
        chosen[name] = (first, *rest) if rest else first
    return Views(**chosen)


def _jitter(height: int, width: int, random: Generator) -> Move:
    """Large-scale jitter as HQ-SAM does it: scaled against a square of the longest side, then cut or padded to it.

    The square of an enlarged image is cut in pixels of the image, before anything is made larger.
    """
    mirror, scale, down, across = random.random(4).tolist()
    low, high = SCALES
    scale = low + (high - low) * scale
    side, window, size = max(height, width), (0, 0, height, width), (height, width)
    if scale < 1:
        size = max(1, round(height * scale)), max(1, round(width * scale))
    else:
        side = max(1, round(side / scale))
        size = rows, columns = min(height, side), min(width, side)
        window = (int(down * (height - rows + 1)), int(across * (width - columns + 1)), rows, columns)
    return Move(mirror < MIRRORED, False, 0, window, size, (side, side))


def _plain_move(mirror: bool, window: tuple[int, int, int, int]) -> Move:
    return Move(mirror, False, 0, window, window[2:], window[2:])


@lru_cache(maxsize=1024)  # images of one size have the same tiles, and most datasets have few sizes
def _tiles(height: int, width: int, side: int, overlap: int) -> tuple[View, ...]:
    windows = [
        (top, left, min(side, height), min(side, width))
        for top in _starts(height, side, overlap)
        for left in _starts(width, side, overlap)
    ]
    moves = [_plain_move(False, window) for window in windows]
    return tuple(View(f"tile/{number}", height, width, move) for number, move in enumerate(moves))


def _steps(length: int, side: int, overlap: int) -> int:
    """How many tiles begin along one axis."""
    return len(range(0, max(0, length - side), side - overlap)) + 1


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Where the tiles of one axis begin; the last one ends at the border."""
    last = max(0, length - side)
    return [*range(0, last, side - overlap), last]


def _apply(move: Move, mask: np.ndarray) -> np.ndarray:
    return move.apply(tv_tensors.Mask(torch.from_numpy(mask)[None]))[0].numpy()
