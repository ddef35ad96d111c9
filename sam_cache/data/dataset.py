"""What every dataset format becomes: images in a fixed order, and each image's objects on demand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sam_cache.types import ImageRecord, ObjectRecord


@dataclass(frozen=True)
class Dataset:
    """A list of images with a way to read each one and a way to get its objects.

    `images` never loses or reorders a row because a file is bad: such an image fails in `read` or
    in `decode`, with an ImageError. `read(record)` gives the bytes of the image file.
    `convert(number)` makes the objects of `images[number]`, and one line for each it had to leave
    out. `categories` names the category ids; `frequencies` has LVIS's r, c or f for them.
    `tell_categories(number)` tells those of an image's objects, crowds left out, without making their
    masks; it is None where only the masks could tell.

    `notes` tell the person how the files were understood; `problems` list what was left out, and
    grow as `objects` is called.
    """

    images: Sequence[ImageRecord]
    categories: dict[int, str]
    read: Callable[[ImageRecord], bytes]
    convert: Callable[[int], tuple[list[ObjectRecord], list[str]]]
    frequencies: dict[int, str] = field(default_factory=dict)
    tell_categories: Callable[[int], list[int]] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _reported: set[int] = field(default_factory=set, repr=False)

    def list_categories(self) -> list[dict]:
        """The categories as COCO lists them; LVIS adds the frequency by which its AP is split."""
        return [
            {"id": id, "name": name} | ({"frequency": self.frequencies[id]} if id in self.frequencies else {})
            for id, name in sorted(self.categories.items())
        ]

    def objects(self, number: int) -> list[ObjectRecord]:
        """The usable objects of `images[number]`; what was wrong with the others goes to `problems`, once."""
        objects, problems = self.convert(number)
        if number not in self._reported:
            self._reported.add(number)
            self.problems.extend(problems)
        return objects
