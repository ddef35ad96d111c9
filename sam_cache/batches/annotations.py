"""Rows -> the prompts and targets of their objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from sam_cache.batches.canvas import Canvas
from sam_cache.batches.known_masks import KNOWN_BYTES, KnownMask, KnownMasks
from sam_cache.batches.order import Visit
from sam_cache.batches.pixels import Preprocessing
from sam_cache.batches.places import Places
from sam_cache.data import (
    ColumnRuns,
    Geometry,
    Patch,
    PromptMixture,
    column_runs,
    cover,
    keyed_generator,
    sample_prompts,
)
from sam_cache.store import ImageTable, Table
from sam_cache.types import Prompts, Targets

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


@dataclass(frozen=True, slots=True)
class AskedImage:
    """An image of a batch, `count` objects of which are asked for; `key` keys chance, as `Visit.key`."""

    id: int
    geometry: Geometry
    key: int
    count: int
    weight: float = 1.0


def annotate_images(
    images: Sequence[AskedImage],
    columns: Table,
    objects: np.ndarray,
    patches: Sequence[Patch],
    runs_of: Callable[[int], ColumnRuns],
    sampling: Sampling,
    canvas: Canvas,
) -> Annotation:
    """Draw a prompt for each object of the images, one image's after another's.

    `columns` describe the objects, `objects` is what to call them, `patches` are their masks, and `runs_of`
    gives those again where points are drawn from them. The targets are valid until `canvas` is drawn on again.
    """
    counts = np.array([image.count for image in images], np.int64)
    geometries = [image.geometry for image in images]
    weights = np.array([image.weight for image in images], np.float32).repeat(counts)
    targets = canvas.draw(patches, geometries, weights)
    prompts = sample_prompts(
        sampling.mixture,
        columns,
        np.arange(len(images)).repeat(counts).tolist(),
        [image.id for image in images],
        geometries,
        runs_of,
        targets.masks.numpy().__getitem__,
        seed=sampling.seed,
        epochs=[image.key for image in images],
        training=sampling.training,
    )
    return Annotation(prompts, targets, objects)


def annotate_image(
    image: AskedImage, columns: Table, objects: np.ndarray, resolution: int, sampling: Sampling
) -> Annotation:
    """The same for one image, whose masks are `columns["rle"]`."""
    runs = column_runs(columns["rle"], image.geometry.height, image.geometry.width)
    patches = cover(runs, image.geometry, resolution)
    return annotate_images([image], columns, objects, patches, runs.only, sampling, Canvas(resolution))


class Annotator:
    """Draws prompts and targets for rows: the same ones for the same (seed, visit, image, object).

    `resolution` is the side of the decoder's output for the whole padded input. Crowds are never
    prompted. Masks that were made once are kept, in at most `known_bytes`. Threads may share one.
    """

    def __init__(
        self,
        images: ImageTable,
        objects: Table,
        how: Preprocessing,
        resolution: int,
        sampling: Sampling,
        known_bytes: int = KNOWN_BYTES,
    ):
        self._images, self._objects, self._how = images, objects, how
        self._resolution, self._sampling = resolution, sampling
        self._known = KnownMasks(known_bytes)
        self._draws_points = any(choice.kind == "point" for choice in sampling.mixture.choices)
        self._entries = Places(images.rows)
        usable = np.flatnonzero(~objects["iscrowd"] & (objects["area"] > 0))
        self._by_row = Places(objects["row"][usable])
        self._usable = usable[self._by_row.places]

    def __contains__(self, row: int) -> bool:
        """Whether the row has an object to ask for."""
        return bool(self.has_objects(np.array([row]))[0])

    def has_objects(self, rows: np.ndarray) -> np.ndarray:
        """A boolean per row: whether it has an object to ask for."""
        starts, stops = self._by_row.ranges(rows)
        return stops > starts

    def image_id(self, row: int) -> int:
        return int(self._images.ids[self._entries.of(np.array([row]))[0]])

    def geometry(self, row: int) -> Geometry:
        (entry,) = self._entries.of(np.array([row]))
        return self._geometry(int(self._images.heights[entry]), int(self._images.widths[entry]))

    def canvas(self, pin: bool = False) -> Canvas:
        """Room for the targets of one batch at a time, for `annotate`; `pin` makes it page-locked."""
        return Canvas(self._resolution, pin)

    def annotate(self, visits: Sequence[Visit], canvas: Canvas | None = None) -> Annotation:
        """Prompts and targets for the objects of the visited rows; the targets are valid as long as `canvas` says."""
        rows = np.array([visit.row for visit in visits], np.int64)
        entries, (starts, stops) = self._entries.of(rows), self._by_row.ranges(rows)
        ids, heights, widths = (
            column[entries].tolist() for column in (self._images.ids, self._images.heights, self._images.widths)
        )
        images, chosen, masks = [], [], []
        for place, (visit, start, stop) in enumerate(zip(visits, starts.tolist(), stops.tolist(), strict=True)):
            kept, weight = self._sampling.choose(stop - start, ids[place], visit)
            objects, geometry = self._usable[start:stop][kept], self._geometry(heights[place], widths[place])
            images.append(AskedImage(ids[place], geometry, visit.key, len(objects), weight))
            chosen.append(objects)
            masks += self._masks(objects.tolist(), geometry)
        objects = np.concatenate(chosen) if chosen else np.zeros(0, np.int64)
        return annotate_images(
            images,
            {name: self._objects[name][objects] for name in self._sampling.mixture.columns},
            objects,
            [mask.patch for mask in masks],
            lambda p: masks[p].runs,
            self._sampling,
            canvas or self.canvas(),
        )

    def _masks(self, objects: list[int], geometry: Geometry) -> list[KnownMask]:
        """The masks of some objects of one image; those that are not known are made together."""
        found = {number: self._known.get(number) for number in objects}
        missing = [number for number, mask in found.items() if mask is None]
        if missing:
            rles = [self._objects["rle"][number] for number in missing]
            runs = column_runs(rles, geometry.height, geometry.width)
            for place, (number, patch) in enumerate(zip(missing, cover(runs, geometry, self._resolution), strict=True)):
                found[number] = KnownMask(patch, runs.only(place) if self._draws_points else None)
                self._known.keep(number, found[number])
        return [found[number] for number in objects]

    def _geometry(self, height: int, width: int) -> Geometry:
        return _geometry(height, width, self._how.input_size, self._how.fit)


_geometry = lru_cache(maxsize=1024)(Geometry)  # it remembers its scales, and images have few sizes
