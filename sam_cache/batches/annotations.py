"""Rows of a store -> the prompts and targets of their objects."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sam_cache.batches.pixels import Preprocessing
from sam_cache.data import (
    Geometry,
    MaskCrop,
    PromptMixture,
    coverage,
    crop_rle,
    keyed_generator,
    rle_to_mask,
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
    `scale_sampled` each then weighs n / kept, so that the image counts in full.
    """

    mixture: PromptMixture
    seed: int
    training: bool
    max_objects: int | None = None
    scale_sampled: bool = False


class Annotator:
    """Draws prompts and targets for rows: the same ones for the same (seed, epoch, image, object).

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

    def mask(self, index: int) -> np.ndarray:
        """Object `index` as a boolean (H, W), at its image's size."""
        geometry = self.geometry(self._objects["row"][index])
        return rle_to_mask(self._objects["rle"][index], geometry.height, geometry.width).astype(bool)

    def annotate(self, rows: Sequence[int], epoch: int = 0) -> tuple[Prompts, Targets, np.ndarray]:
        """Prompts and targets for the objects of `rows`, and which objects these are."""
        geometries = [self.geometry(row) for row in rows]
        chosen = [self._choose(int(row), epoch) for row in rows]
        objects = np.concatenate([np.zeros(0, np.int64), *(found for found, _ in chosen)])
        image_index = np.repeat(np.arange(len(rows)), [len(found) for found, _ in chosen])
        crops = [self._crop(index) for index in objects.tolist()]
        prompts = sample_prompts(
            self._sampling.mixture,
            {name: self._objects[name][objects] for name in PROMPT_COLUMNS},
            image_index.tolist(),
            [self.image_id(row) for row in rows],
            geometries,
            crops.__getitem__,
            seed=self._sampling.seed,
            epoch=epoch,
            training=self._sampling.training,
        )
        masks = np.zeros((len(objects), self._resolution, self._resolution), np.float32)
        for place, (crop, image) in enumerate(zip(crops, image_index.tolist(), strict=True)):
            masks[place] = coverage(crop, geometries[image], self._resolution)
        targets = Targets(
            masks=torch.from_numpy(masks),
            valid=torch.from_numpy(np.stack([valid_coverage(g, self._resolution) for g in geometries])),
            weights=torch.tensor([weight for found, weight in chosen for _ in found], dtype=torch.float32),
        )
        return prompts, targets, objects

    def _crop(self, index: int) -> MaskCrop:
        geometry = self.geometry(self._objects["row"][index])
        return crop_rle(self._objects["rle"][index], geometry.height, geometry.width)

    def _choose(self, row: int, epoch: int) -> tuple[np.ndarray, float]:
        """The row's objects to ask for in this epoch, and what each of them weighs."""
        sampling = self._sampling
        found = self._objects_of_row.get(row, np.zeros(0, np.int64))
        if sampling.max_objects is None or len(found) <= sampling.max_objects:
            return found, 1.0
        generator = keyed_generator(sampling.seed, epoch, self.image_id(row), WHOLE_IMAGE)
        kept = np.sort(generator.choice(found, sampling.max_objects, replace=False))
        return kept, len(found) / len(kept) if sampling.scale_sampled else 1.0
