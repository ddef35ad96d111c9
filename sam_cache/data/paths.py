"""Reading files that an annotation names, without ever leaving the dataset's folder."""

from pathlib import Path

from sam_cache.errors import ImageError


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
