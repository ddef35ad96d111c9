"""This process among its siblings: one process unless torchrun says otherwise."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world` processes; `local` counts within one machine and picks its accelerator."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_env(cls) -> "Ranks":
        """Read what torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK."""
        return cls(
            *(
                int(os.environ.get(name, default))
                for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
            )
        )

    def share(self, work: Iterable) -> Iterator:
        """Every `world`-th item, starting with this rank's: disjoint over ranks, complete together."""
        return (item for number, item in enumerate(work) if number % self.world == self.rank)
