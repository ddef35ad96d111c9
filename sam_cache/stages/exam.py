"""What networks are examined on: images with all their objects, the same whether cached or read live."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from sam_cache.data import Geometry, PromptMixture
from sam_cache.types import Batch


@dataclass(frozen=True)
class Exam:
    """One image, asked for all of its objects by one kind of prompt.

    `batch` holds this image alone. `rles`, `categories` and `batch.objects` are of its prompts' objects,
    at the image's size.
    """

    row: int
    image_id: int
    kind: PromptMixture
    geometry: Geometry
    batch: Batch
    rles: list[bytes]
    categories: list[int]


class Data(Protocol):
    """What a stage trains on and is scored on: rows of a store, or images of a dataset.

    `categories` are listed as COCO does; `style` says whose AP counts, `coco` or `lvis`. `train` and
    `held_out` are rows, `where` names the source to a person.
    """

    where: str
    categories: list[dict]
    style: str
    train: np.ndarray
    held_out: np.ndarray

    def names(self, rows: np.ndarray) -> list[str]:
        """What images are called in any store or dataset that holds them: id and path."""
        ...

    def exams(
        self, rows: Sequence[int], kinds: Sequence[PromptMixture], seed: int, resolution: int
    ) -> Iterator[list[Exam]]:
        """For each of `rows` that has objects, one exam per kind, all of the same image."""
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
