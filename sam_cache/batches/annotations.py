"""Rows -> the prompts and targets of their objects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sam_cache.batches.order import Visit
from sam_cache.batches.pixels import Preprocessing
from sam_cache.data import (
    Geometry,
    PromptMixture,
    coverage,
    crop_rle,
    keyed_generator,
    sample_prompts,
    valid_coverage,
)
from sam_cache.store import ImageTable, Table
from sam_cache.types import Prompts, Targets

PROMPT_COLUMNS = ("id", "box_xywh_image", "centroid_xy_image", "bbox_center_xy_image", "interior_xy_image")
WHOLE_IMAGE = -1  # in place of an object's id, where chance belongs to an image


@dataclass(frozen=True)
class Sampling:
    """Which objects of an image are asked for, and how; `training` turns box noise on.

    Of an image with more than `max_objects` that many are drawn anew in every epoch; with
    `scale_sampled` each then weighs n / kept, so that the image counts in full. `by_object` shares an
    image's objects out to its visits instead: together the visits of an epoch ask for each object once.
    """

    mixture: PromptMixture
    seed: int
    training: bool
    max_objects: int | None = None
    scale_sampled: bool = False
    by_object: bool = False

    def choose(self, count: int, image_id: int, visit: Visit) -> tuple[np.ndarray, float]:
        """Which of an image's `count` objects to ask for, ascending, and what each of them weighs."""
        if self.max_objects is None or count <= self.max_objects:
            return np.arange(count), 1.0
        if self.by_object:
            shuffled = keyed_generator(self.seed, visit.epoch, image_id, WHOLE_IMAGE).permutation(count)
            first = visit.number * self.max_objects
            return np.sort(shuffled[first : first + self.max_objects]), 1.0
        generator = keyed_generator(self.seed, visit.key, image_id, WHOLE_IMAGE)
        kept = np.sort(generator.choice(count, self.max_objects, replace=False))
        return kept, count / len(kept) if self.scale_sampled else 1.0


@dataclass(frozen=True)
class Annotation:
    """Prompts and targets of one image, and which objects they ask for."""

    prompts: Prompts
    targets: Targets
    objects: np.ndarray

    @staticmethod
    def join(parts: Sequence["Annotation"]) -> "Annotation":
        """Those of several images after one another, as one batch has them."""
        targets = Targets(
            masks=torch.cat([part.targets.masks for part in parts]),
            valid=torch.cat([part.targets.valid for part in parts]),
            weights=torch.cat([part.targets.weights for part in parts]),
        )
        return Annotation(
            Prompts.join([part.prompts for part in parts]), targets, np.concatenate([part.objects for part in parts])
        )


def annotate_image(
    columns: Table, objects: np.ndarray, weight: float, image_id: int, geometry: Geometry, resolution: int,
    sampling: Sampling, visit: Visit,
) -> Annotation:  # fmt: skip
    """Draw a prompt for each of the objects in `columns`, `objects` being what to call them."""
    crops = [crop_rle(columns["rle"][place], geometry.height, geometry.width) for place in range(len(objects))]
    masks = np.zeros((len(objects), resolution, resolution), np.float32)
    for place, crop in enumerate(crops):
        masks[place] = coverage(crop, geometry, resolution)
    prompts = sample_prompts(
        sampling.mixture,
        {name: columns[name] for name in PROMPT_COLUMNS},
        [0] * len(objects),
        [image_id],
        [geometry],
        crops.__getitem__,
        masks.__getitem__,
        seed=sampling.seed,
        epoch=visit.key,
        training=sampling.training,
    )
    targets = Targets(
        masks=torch.from_numpy(masks),
        valid=torch.from_numpy(valid_coverage(geometry, resolution)[None]),
        weights=torch.full((len(objects),), weight, dtype=torch.float32),
    )
    return Annotation(prompts, targets, objects)


class Annotator:
    """Draws prompts and targets for rows: the same ones for the same (seed, visit, image, object).

    `resolution` is the side of the decoder's output for the whole padded input. Crowds are never
    prompted.
    """

    def __init__(self, images: ImageTable, objects: Table, how: Preprocessing, resolution: int, sampling: Sampling):
        self._images, self._objects, self._how = images, objects, how
        self._resolution, self._sampling = resolution, sampling
        self._image_of_row = {int(row): number for number, row in enumerate(images.rows)}
        usable = np.flatnonzero(~objects["iscrowd"] & (objects["area"] > 0))
        usable = usable[np.argsort(objects["row"][usable], kind="stable")]
        rows, starts = np.unique(objects["row"][usable], return_index=True)
        self._objects_of_row = dict(zip(rows.tolist(), np.split(usable, starts[1:]), strict=bool(len(rows))))

    def __contains__(self, row: int) -> bool:
        """Whether the row has an object to ask for."""
        return int(row) in self._objects_of_row

    def image_id(self, row: int) -> int:
        return int(self._images.ids[self._image_of_row[int(row)]])

    def geometry(self, row: int) -> Geometry:
        image = self._image_of_row[int(row)]
        height, width = int(self._images.heights[image]), int(self._images.widths[image])
        return Geometry(height, width, self._how.input_size, self._how.fit)

    def annotate(self, visits: Sequence[Visit]) -> Annotation:
        """Prompts and targets for the objects of the visited rows."""
        return Annotation.join([self._annotate_row(visit) for visit in visits])

    def _annotate_row(self, visit: Visit) -> Annotation:
        image_id, found = self.image_id(visit.row), self._objects_of_row.get(visit.row, np.zeros(0, np.int64))
        chosen, weight = self._sampling.choose(len(found), image_id, visit)
        objects = found[chosen]
        columns = {name: self._objects[name][objects] for name in PROMPT_COLUMNS}
        columns["rle"] = [self._objects["rle"][index] for index in objects.tolist()]
        return annotate_image(
            columns, objects, weight, image_id, self.geometry(visit.row), self._resolution, self._sampling, visit
        )
