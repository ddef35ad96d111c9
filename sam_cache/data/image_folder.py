"""A folder of images that nobody has annotated."""

from pathlib import Path

from sam_cache.data.dataset import Dataset
from sam_cache.data.paths import list_files, name_to_id, read_inside
from sam_cache.errors import DatasetError
from sam_cache.types import ImageRecord


def open_images(folder: Path) -> Dataset:
    """Every image file below `folder`, in the order of their names, without any objects.

    An image has the id that it has in a folder with masks (`open_masks`). Sizes are 0, for there is no
    annotation that an image would have to fit: it is decoded as it is displayed. A link that leads out
    of the folder is listed, and fails when it is read.

    Raises DatasetError where there is no such folder, or no image in it.
    """
    records = [ImageRecord(name_to_id(name), name) for name in list_files(folder)]
    if not records:
        raise DatasetError(f"{folder}: no image in it, nor in its folders; give the folder that holds the images")
    return Dataset(
        records,
        categories={},
        read=lambda record: read_inside(folder, record.path),
        convert=lambda number: ([], []),
    )
