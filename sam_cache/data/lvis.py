"""LVIS: COCO's format, COCO's 2017 images, and two ways to name them.

Version 1 has only `coco_url`, whose last two parts are `train2017/000000391895.jpg` or the same in
`val2017`. Version 0.5 has a `file_name` too, which may carry the 2014 prefix
`COCO_val2014_000000266409.jpg` although the image is the 2017 one.
"""

from pathlib import Path

from sam_cache.data.coco import Image, dataset_of, read_annotations
from sam_cache.data.dataset import Dataset
from sam_cache.data.paths import holds_file
from sam_cache.errors import DatasetError

VERSIONS = ("v1", "v0.5")


def open_lvis(
    root: Path | None, split: str | None, images: Path | None, annotations: Path | None, limit: int | None
) -> Dataset:
    """LVIS annotations, version 1 or 0.5: `annotations` with `images`, or the standard layout under `root`.

    The standard layout is `lvis_v1_{split}.json` in `root` or in `annotations/`; `split` is train
    unless given. Images lie in `train2017/` and `val2017/` (version 1 uses both for either split),
    or all in the image folder itself.
    """
    split = split or "train"
    notes = []
    if annotations is None:
        if root is None:
            raise DatasetError("no annotations given: --annotations FILE with --images DIR, or --root DIR")
        annotations = _find_annotations(root, split)
        notes = [f"split {split}"]
    folder = images or root
    if folder is None or not folder.is_dir():
        raise DatasetError(
            f"{folder or 'image folder'}: no such folder; give the one that holds train2017/ and val2017/ with --images"
        )
    contents = read_annotations(annotations)
    divided = any((folder / name).is_dir() for name in ("train2017", "val2017"))
    names = [name_image(image, folder, divided) for image in contents.images]
    return dataset_of(annotations, contents, folder, names, limit, notes)


def _find_annotations(root: Path, split: str) -> Path:
    names = [f"lvis_{version}_{split}.json" for version in VERSIONS]
    candidates = [folder / name for name in names for folder in (root, root / "annotations")]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise DatasetError(
            f"{candidates[0]}: no such file; get it from https://www.lvisdataset.org/dataset and the 2017 images "
            f"from https://cocodataset.org/#download, and unpack both in {root}"
        )
    return found


def name_image(image: Image, folder: Path, divided: bool) -> str:
    """Where the image lies, relative to `folder`."""
    if not image.coco_url:
        return image.file_name
    # A path object for each of 100,000 images takes four times as long.
    parent, name = ("", "", *(part for part in image.coco_url.split("/") if part not in ("", ".")))[-2:]
    if divided:
        return f"{parent}/{name}"
    return image.file_name if image.file_name and not holds_file(folder, name) else name
