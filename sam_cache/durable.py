"""File operations that survive a kill and a power cut.

A file counts as there only after its bytes, then its name, are on disk: fsync the file, give it
its name by `link` (which never replaces) or `replace`, fsync the folder.
"""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            fsync(Path(folder, name))
        fsync(Path(folder))


def make_folders(path: Path) -> None:
    """`mkdir -p`, each new name made durable in its parent."""
    if not path.is_dir():
        make_folders(path.parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        fsync(path.parent)


def place(path: Path, data: bytes) -> bool:
    """Create `path` whole and durable; False, changing nothing, when it exists already."""
    draft = _write_draft(path, data)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(draft)
    fsync(path.parent)
    return True


def replace(path: Path, data: bytes) -> None:
    """Create or replace `path`: whole and durable, the old bytes or the new."""
    os.replace(_write_draft(path, data), path)
    fsync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Move a folder to a name that is free; its content has been synced before."""
    os.rename(source, target)
    fsync(target.parent)


def remove_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
        fsync(path.parent)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[int]:
    """Hold `path`, created if need be, under an exclusive lock that dies with the process.

    Yields its descriptor. Raises BlockingIOError when another holds it and `wait` is False.
    The holder may unlink the file: whoever was waiting for it then creates a new one.
    """
    descriptor = _lock(path, wait)
    try:
        yield descriptor
    finally:
        # Explicitly, since a forked child may hold a copy of the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _write_draft(path: Path, data: bytes) -> Path:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return draft
