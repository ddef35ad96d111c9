"""What networks are examined on: images with all their objects, the same whether cached or read live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from sam_cache.data import Geometry, PromptMixture
from sam_cache.stages.tiles import Tile
from sam_cache.types import Batch


@dataclass(frozen=True)
class Exam:
    """One image, asked for all of its objects by one kind of prompt.

    `batch` holds this image alone. `rles`, `categories` and `batch.objects` are of its prompts' objects,
    at the image's size. Of an image that is asked about in tiles this is one `tile`: `row` stands for the whole
    image then, all else is the tile's, and `ids` are the objects' own, the same in all tiles.
    """

    row: int
    image_id: int
    kind: PromptMixture
    geometry: Geometry
    batch: Batch
    rles: list[bytes]
    categories: list[int]
    tile: Tile | None = None
    ids: list[int] = field(default_factory=list)


class Data(Protocol):
    """What a stage trains on and is scored on: rows of a store, or images of a dataset.

    `categories` are listed as COCO does; `style` says whose AP counts, `coco` or `lvis`. `train` and
    `held_out` are rows, `where` names the source to a person. An image may have several rows to train on, but
    one of `held_out`. `view` says what of it is scored: `identity` the image, `tile` its tiles put together
    again, else a view's name.
    """

    where: str
    view: str
    categories: list[dict]
    style: str
    train: np.ndarray
    held_out: np.ndarray

    def names(self, rows: np.ndarray) -> list[str]:
        """What images are called in any store or dataset that holds them: id and path."""
        ...

    def sets_of(self, rows: np.ndarray) -> list[str]:
        """The set that each row's image belongs to, where a dataset has several; else an empty string."""
        ...

    def exams(
        self, rows: Sequence[int], kinds: Sequence[PromptMixture], seed: int, resolution: int
    ) -> Iterator[list[Exam]]:
        """For each of `rows` that has objects, one exam per kind, all of the same image; once per tile."""
        ...

    def looks(self, rows: np.ndarray) -> np.ndarray | None:
        """Which image each row shows and by which look, as `Order` takes it; None where no image has several."""
        ...

    def categories_of(self, rows: np.ndarray) -> list[np.ndarray]:
        """For each row the category of every object that can be asked for."""
        ...

    def ground_truth(self, rows: np.ndarray) -> dict:
        """The objects of `rows` as COCO's file format has them, crowds included as regions to ignore."""
        ...

    def report_problems(self) -> None:
        """Say what could not be read and was left out."""
        ...

    def picture(self, row: int) -> np.ndarray:
        """The image of a row, uint8 RGB (H, W, 3), to draw on; grey where the file is not at hand."""
        ...
