"""A run's folder: its configuration, its metrics, its checkpoints.

config.json            the resolved configuration
record.json            what the run was given: store, rows trained on, rows held out, sizes
metrics.jsonl          one JSON object per line, keyed by `step`
summary.json           how it ended: steps, best score, seconds, peak memory
curves.png             its losses, scores and learning rate
tensorboard/, wandb/   the metrics and pictures again, for these trackers
checkpoints/step-000100/{weights.safetensors, optimizer.pt, state.json}
last, best             text files, each naming a checkpoint folder
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sam_cache import durable
from sam_cache.errors import CheckpointError, UsageError


class RunFolder:
    """Made by `create`, found again by `open`."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def create(cls, path: Path) -> "RunFolder":
        """Raises UsageError where there is a run already."""
        if (path / "config.json").exists():
            raise UsageError(f"{path}: already holds a run; add --resume to go on, or choose another --out")
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Raises CheckpointError where there is no run."""
        if not (path / "config.json").exists():
            raise CheckpointError(f"{path}: no run there; name the folder that a training wrote")
        return cls(path)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / name).read_text())

    def _write(self, name: str, text: str) -> None:
        durable.replace(self.path / name, text.encode())

    def log(self, metrics: dict[str, Any]) -> None:
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl but a last one that a kill or a full disk cut off; [] without any."""
        path = self.path / "metrics.jsonl"
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in whole]

    def forget_metrics_after(self, step: int) -> None:
        """Drop what a killed run logged after the checkpoint that training goes on from."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def restore_best(self, step: int) -> None:
        """Let `best` name the checkpoint of `step`, which a kill after naming `last` has prevented."""
        best = self.path / "checkpoints" / f"step-{step:06d}"
        if best.is_dir() and self._named("best") != best:
            self._write("best", best.name + "\n")

    def save(self, step: int, weights: dict[str, Tensor], optimizer: dict, state: dict[str, Any], best: bool) -> None:
        """Commit a checkpoint: written aside, synced, renamed, and only then named by `last` (and `best`).

        `weights` are the trained parameters alone. Other checkpoints than last and best are removed.
        """
        folder = self.path / "checkpoints"
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
        save_file({name: value.contiguous() for name, value in weights.items()}, aside / "weights.safetensors")
        torch.save(optimizer, aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        # safetensors and mkdtemp make what nobody else may read; as open as the others, it can be shared.
        (aside / "weights.safetensors").chmod((aside / "state.json").stat().st_mode)
        aside.chmod(folder.stat().st_mode)
        durable.fsync_tree(aside)
        final = folder / f"step-{step:06d}"
        if final.exists():  # killed after the rename, before `last` named it
            shutil.rmtree(final)
        durable.rename(aside, final)
        for name in ("last", "best") if best else ("last",):
            self._write(name, final.name + "\n")
        named = {self._named(name) for name in ("last", "best")}
        for other in folder.iterdir():
            if other not in named:
                shutil.rmtree(other)

    def _named(self, name: str) -> Path | None:
        pointer = self.path / name
        return self.path / "checkpoints" / pointer.read_text().strip() if pointer.exists() else None

    def load_weights(self, name: str = "best") -> dict[str, Tensor]:
        """Trained parameters of checkpoint `last` or `best`. Raises CheckpointError when there is none."""
        return load_file(self._existing(name) / "weights.safetensors")

    def load_training(self) -> tuple[dict[str, Tensor], dict, dict[str, Any]]:
        """(weights, optimizer state, loop state) of the last checkpoint."""
        folder = self._existing("last")
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        return self.load_weights("last"), optimizer, json.loads((folder / "state.json").read_text())

    def _existing(self, name: str) -> Path:
        folder = self._named(name)
        if folder is None or not folder.is_dir():
            raise CheckpointError(
                f"{self.path}: no {name} checkpoint; train on to its first evaluation, or take --which last"
            )
        return folder

    @property
    def resumable(self) -> bool:
        return self._named("last") is not None
