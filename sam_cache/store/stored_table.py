"""A table of a store, whose columns are read when they are first asked for."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sam_cache.store.columns import Ragged, join, read_column
from sam_cache.store.ledger import changed, damage


class StoredTable(Mapping):
    """Columns by their names, those of all `parts` (folders below `root`) under one another. Not to be written to.

    Of millions of objects, whoever asks wants a few columns, and to read the others would take longer than all else
    that opening does. `files` are what was committed, path below `root` -> [size, sha256]: the first look at a column
    raises DamageError if that is not what is there. Parts without any column hold no objects.
    """

    def __init__(self, root: Path, parts: Sequence[str], files: dict[str, list]):
        self._root, self._parts, self._files = root, parts, files
        self._read: dict[str, np.ndarray | Ragged] = {}
        self._lock = threading.Lock()  # two threads that both need a column would both read it
        self._folders: dict[str, list[str]] = {}  # of each column, in the order of the parts
        for part in parts:
            inside = (file[len(part) + 1 :].split("/") for file in files if file.startswith(f"{part}/"))
            for name in sorted({steps[0] for steps in inside if len(steps) > 1}):
                self._folders.setdefault(name, []).append(f"{part}/{name}")

    def __reduce__(self) -> tuple:
        return StoredTable, (self._root, self._parts, self._files)  # another process reads for itself

    def __getitem__(self, name: str) -> np.ndarray | Ragged:
        if name not in self._read:
            with self._lock:
                if name not in self._read:
                    self._read[name] = self.read(name)
        return self._read[name]

    def read(self, name: str) -> np.ndarray | Ragged:
        """The column, anew and not kept: for whoever makes something else of it."""
        folders = self._folders[name]
        prefixes = tuple(f"{folder}/" for folder in folders)
        committed = {file: entry for file, entry in self._files.items() if file.startswith(prefixes)}
        for what in changed(self._root, committed):
            raise damage(self._root, what)
        return join([read_column(self._root / folder) for folder in folders])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._folders))

    def __len__(self) -> int:
        return len(self._folders)
