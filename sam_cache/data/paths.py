"""Listing, naming and reading the files of a dataset's folder, without ever leaving it."""

import os
from hashlib import blake2b
from pathlib import Path

from sam_cache.errors import DatasetError, ImageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".avif", ".gif", ".bmp", ".jp2"}
SUFFIXES |= {".pgm", ".ppm", ".pbm"}


def list_files(root: Path) -> dict[str, str]:
    """Every image file below `root`: its name relative to that, with forward slashes, and its whole path; sorted.

    Told by the suffix. What is hidden is left out, with all that a hidden folder holds: file managers and
    notebooks keep copies there. Links to folders are not followed. Raises DatasetError where there is no folder.
    """
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; correct the path")
    root = root.resolve()
    files = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith("."):
                files[Path(folder, name).relative_to(root).as_posix()] = os.path.join(folder, name)
    return dict(sorted(files.items()))


def name_to_id(name: str) -> int:
    """48 bits of a hash, so that an image keeps its id, and its side of the held-out split, when others are added."""
    return int.from_bytes(blake2b(name.encode(), digest_size=6).digest())


def resolve_inside(root: Path, relative: str) -> Path:
    """The file `relative` names under `root`, with every link followed.

    Raises ImageError where the name is absolute, climbs out with `..`, or passes a symbolic link
    that leads outside: an annotation file from somewhere else must not make us read other files.
    """
    try:
        path = (root / relative).resolve()
        inside = path.is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a zero byte in the name
        raise ImageError(f"{relative!r}: not a usable file name ({error})") from None
    if not inside:
        raise ImageError(f"{relative!r}: leads outside {root}; move the file there or correct the name")
    return path


def holds_file(root: Path, relative: str) -> bool:
    """Whether `read_inside` has a chance."""
    try:
        return resolve_inside(root, relative).is_file()
    except (ImageError, OSError):
        return False


def read_inside(root: Path, relative: str) -> bytes:
    """The bytes of a regular file under `root`. Raises ImageError where they cannot be had."""
    path = resolve_inside(root, relative)
    try:
        if not path.is_file():  # a named pipe would block for ever
            raise ImageError(f"{relative}: no such file in {root}")
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{relative}: cannot be read ({error.strerror})") from None
