"""What training end to end and its evaluation read: the images of a dataset, and who is held out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sam_cache.batches import (
    LiveImages,
    Preprocessing,
    Sampling,
    Visit,
    collate,
    is_held_out,
    usable_objects,
)
from sam_cache.data import Augmentation, Dataset, PromptMixture, decode
from sam_cache.errors import DatasetError, ImageError
from sam_cache.stages.coco_format import coco_annotation, coco_image
from sam_cache.stages.exam import Exam
from sam_cache.stages.progress import Bar, say, say_some


@dataclass(frozen=True)
class LiveData:
    """A dataset with its images' numbers as `train` and `held_out` rows. It is a `stages.exam.Data`.

    Masks are read when their image is, so that training starts at once; what cannot be read is kept in
    `problems`, by row, and left out.
    """

    dataset: Dataset
    where: str
    how: Preprocessing
    style: str
    train: np.ndarray
    held_out: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset, where: str, how: Preprocessing, style: str, held_out: float, seed: int) -> "LiveData":
        """The images that have objects, as far as that is known without reading masks, as from a store.

        Raises DatasetError where there is none.
        """
        tell = dataset.tell_categories
        rows = np.array([row for row in range(len(dataset.images)) if tell is None or tell(row)], np.int64)
        if not len(rows):
            raise DatasetError(
                f"{where}: none of its {len(dataset.images)} images has an object; check its paths and --limit"
            )
        records = [dataset.images[row] for row in rows.tolist()]
        ids = np.array([record.id for record in records], np.int64)
        apart = is_held_out(ids, [record.split for record in records], held_out, seed)
        return cls(dataset, where, how, style, rows[~apart], rows[apart])

    @property
    def view(self) -> str:
        return "identity"

    @property
    def categories(self) -> list[dict]:
        return self.dataset.list_categories()

    @property
    def rows(self) -> np.ndarray:
        return np.sort(np.concatenate([self.train, self.held_out]))

    def images(self, resolution: int, sampling: Sampling, augmentation: Augmentation = Augmentation()) -> LiveImages:
        return LiveImages(self.dataset, self.how, resolution, sampling, augmentation, self.problems)

    def exams(
        self, rows: Sequence[int], kinds: Sequence[PromptMixture], seed: int, resolution: int
    ) -> Iterator[list[Exam]]:
        together = PromptMixture(tuple(choice for kind in kinds for choice in kind.choices))
        reader = self.images(resolution, Sampling(together, seed, training=False))
        for row in rows:
            example = reader.read(Visit(int(row)))
            if example is None:
                continue
            yield [
                Exam(
                    row,
                    example.image_id,
                    kind,
                    example.geometry,
                    collate([example.asked(Sampling(kind, seed, training=False))]),
                    example.columns["rle"],
                    example.categories,
                )
                for kind in kinds
            ]

    def looks(self, rows: np.ndarray) -> None:
        """None: a row is an image, augmented anew at every visit."""

    def categories_of(self, rows: np.ndarray) -> list[np.ndarray]:
        found = []
        if (tell := self.dataset.tell_categories) is not None:
            return [np.array(tell(row), np.int64) for row in rows.tolist()]
        with Bar("reading objects", len(rows), "images") as bar:
            for row in rows.tolist():
                objects = usable_objects(self.dataset, row)
                found.append(np.array([object.category for object in objects], np.int64))
                bar.advance()
        return found

    def ground_truth(self, rows: np.ndarray) -> dict:
        images, annotations = [], []
        for row in rows.tolist():
            record = self.dataset.images[row]
            size = record.height, record.width
            images.append(coco_image(record.id, *size))
            for found in self.dataset.objects(row) if all(size) else []:
                annotations.append(
                    coco_annotation(
                        len(annotations) + 1, record.id, found.category, found.box_xywh_image, found.area,
                        found.iscrowd, found.rle, size,
                    )
                )  # fmt: skip
        return {"images": images, "categories": self.categories, "annotations": annotations}

    def report_problems(self) -> None:
        say_some("skipped", self.dataset.problems + [text for _, text in sorted(self.problems.items())])

    def picture(self, row: int) -> np.ndarray:
        record = self.dataset.images[row]
        try:
            return decode(self.dataset.read(record), record, self.how.intensity).image
        except (ImageError, OSError) as error:
            say(f"overlay of row {row} is drawn on grey: {error}")
            return np.full((record.height, record.width, 3), 96, np.uint8)

    def sets_of(self, rows: np.ndarray) -> list[str]:
        return [self.dataset.images[row].split.partition("/")[2] for row in rows.tolist()]

    def names(self, rows: np.ndarray) -> list[str]:
        return [f"{self.dataset.images[row].id} {self.dataset.images[row].path}" for row in rows.tolist()]

    def holding_out(self, trained: list[str], held_out: list[str]) -> "LiveData":
        """The same data, held out exactly as a run recorded by `names`; images it did not know are new."""
        names, everything = np.array(self.names(self.rows)), self.rows
        apart = np.isin(names, held_out) if np.isin(names, held_out).any() else ~np.isin(names, trained)
        return replace(self, train=everything[~apart], held_out=everything[apart])
