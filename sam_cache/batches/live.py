"""Images of a dataset with their prompts and targets, decoded and augmented anew at every visit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from sam_cache.batches.ahead import run_ahead
from sam_cache.batches.annotations import WHOLE_IMAGE, Annotation, AskedImage, Sampling, annotate_image
from sam_cache.batches.order import Cursor, Order, Visit
from sam_cache.batches.pixels import Preprocessing
from sam_cache.data import (
    POINT_COLUMNS,
    Augmentation,
    Dataset,
    Geometry,
    augment,
    decode,
    deterministic_points,
    keyed_generator,
    measure_rle,
    to_pixels,
)
from sam_cache.errors import DatasetError, ImageError
from sam_cache.ranks import Ranks
from sam_cache.store import Table
from sam_cache.types import Batch, ImageRecord, ObjectRecord

AUGMENTING = WHOLE_IMAGE - 1  # in place of an object's id, where chance belongs to an image's augmentation
REDRAWS = 8  # augmentations tried before an image that loses all its objects is taken as it is


@dataclass(frozen=True)
class Example:
    """One image ready for the encoder: `pixels` (S, S, 3) uint8, and the objects that are asked for.

    `columns` and `categories` are of these objects, at the image's size after augmentation.
    """

    row: int
    image_id: int
    geometry: Geometry
    pixels: np.ndarray
    annotation: Annotation
    columns: Table
    categories: list[int]

    def asked(self, sampling: Sampling) -> "Example":
        """The same objects, asked for by another mixture out of the kinds that it was read for."""
        objects, resolution = self.annotation.objects, self.annotation.targets.masks.shape[-1]
        image = AskedImage(self.image_id, self.geometry, Visit(self.row).key, len(objects))
        annotation = annotate_image(image, self.columns, objects, resolution, sampling)
        return replace(self, annotation=annotation)


class LiveImages:
    """Reads examples of a dataset. What cannot be read is noted in `problems`, by row, and left out."""

    def __init__(
        self,
        dataset: Dataset,
        how: Preprocessing,
        resolution: int,
        sampling: Sampling,
        augmentation: Augmentation = Augmentation(),
        problems: dict[int, str] | None = None,
    ):
        self.dataset = dataset
        self.problems: dict[int, str] = {} if problems is None else problems
        self._how, self._resolution = how, resolution
        self._sampling, self._augmentation = sampling, augmentation

    def read(self, visit: Visit) -> Example | None:
        """The image of `visit.row`, a number of the dataset; None without objects or where it is bad."""
        record = self.dataset.images[visit.row]
        objects = usable_objects(self.dataset, visit.row)
        if not objects:
            return None
        chosen, weight = self._sampling.choose(len(objects), record.id, visit)
        if not len(chosen):
            return None
        try:
            image = decode(self.dataset.read(record), record, self._how.intensity).image
        except (ImageError, OSError) as error:  # OSError: from a dataset given in Python
            self.problems[visit.row] = str(error)
            return None
        image, rles, kept = self._augment(image, [objects[place].rle for place in chosen], record, visit)
        chosen = chosen[kept]
        geometry = Geometry(*image.shape[:2], self._how.input_size, self._how.fit)
        columns = self._measure([objects[place] for place in chosen], rles, geometry)
        asked = AskedImage(record.id, geometry, visit.key, len(chosen), weight)
        annotation = annotate_image(asked, columns, chosen, self._resolution, self._sampling)
        pixels = to_pixels(image, geometry, self._how.resize)
        categories = [objects[place].category for place in chosen]
        return Example(visit.row, record.id, geometry, pixels, annotation, columns, categories)

    def _augment(
        self, image: np.ndarray, rles: list[bytes], record: ImageRecord, visit: Visit
    ) -> tuple[np.ndarray, list[bytes], list[int]]:
        random = keyed_generator(self._sampling.seed, visit.key, record.id, AUGMENTING)
        if self._augmentation != Augmentation():
            for _ in range(REDRAWS):
                found = augment(image, rles, random, self._augmentation)
                if found[1]:
                    return found
        return image, rles, list(range(len(rles)))

    def _measure(self, objects: list[ObjectRecord], rles: list[bytes], geometry: Geometry) -> Table:
        """The columns that prompts are drawn from, for masks that augmentation has moved."""
        size = geometry.height, geometry.width
        columns: Table = {
            "id": np.array([found.id for found in objects], np.int64),
            "box_xywh_image": np.array([measure_rle(rle, *size)[0] for rle in rles], np.float64).reshape(-1, 4),
            "rle": rles,
        }
        # The deterministic points cost a distance transform each, so only when they are asked for.
        wanted = {choice.kind for choice in self._sampling.mixture.choices} & POINT_COLUMNS.keys()
        points = [deterministic_points(rle, *size) for rle in rles] if wanted else []
        for column in POINT_COLUMNS.values():
            values = [getattr(point, column) for point in points] or np.zeros((len(rles), 2))
            columns[column] = np.array(values, np.float64).reshape(-1, 2)
        return columns


def usable_objects(dataset: Dataset, row: int) -> list[ObjectRecord]:
    """The objects of an image that can be asked for: no crowds, none without a pixel."""
    record = dataset.images[row]
    if not record.height * record.width:
        return []
    return [found for found in dataset.objects(row) if not found.iscrowd and found.area > 0]


def collate(examples: Sequence[Example]) -> Batch:
    """Examples as one batch without levels."""
    found = Annotation.join([example.annotation for example in examples])
    pixels = torch.from_numpy(np.stack([example.pixels for example in examples])).permute(0, 3, 1, 2)
    sizes = [(example.geometry.content_height, example.geometry.content_width) for example in examples]
    rows = np.array([example.row for example in examples])
    return Batch({}, found.prompts, found.targets, rows, found.objects, pixels, torch.tensor(sizes))


class LiveBatches:
    """Training batches from images, starting after `cursor`; None where this rank's share of one is empty.

    `batch_size` counts the images of all ranks together. Images that cannot be used make a batch
    smaller. Raises DatasetError when a whole epoch held none that can.
    """

    def __init__(
        self,
        images: LiveImages,
        order: Order,
        *,
        batch_size: int,
        ranks: Ranks = Ranks(),
        threads: int = 2,
        cursor: Cursor | None = None,
    ):
        self._images, self._order = images, order
        self._batch_size, self._ranks, self._threads = batch_size, ranks, threads
        self._cursor = cursor or Cursor()

    def state(self) -> dict[str, int]:
        """The place after the last batch drawn; reading ahead does not move it."""
        return self._cursor.state()

    def __iter__(self) -> Iterator[Batch | None]:
        start = self._cursor

        def plan() -> Iterator[tuple[Cursor, list[Visit]]]:
            return self._order.batches(self._batch_size, start, self._ranks)

        visits = (visit for _, share in plan() for visit in share)
        examples = run_ahead(self._images.read, visits, self._threads, ahead=self._batch_size + self._threads)
        in_vain = 0
        for cursor, share in plan():
            usable = [example for example in islice(examples, len(share)) if example is not None]
            in_vain = 0 if usable else in_vain + len(share)
            if in_vain > len(self._order):
                problems = [*self._images.problems.values(), *self._images.dataset.problems, "no image has an object"]
                first = problems[0]
                raise DatasetError(f"none of {in_vain} images can be trained on; the first problem: {first}")
            self._cursor = cursor
            yield collate(usable) if usable else None
