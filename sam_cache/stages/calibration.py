"""What calibrate has found so far, kept in one file; the table it comes to, and the codec to choose."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sam_cache import durable
from sam_cache.config import CalibrateConfig, with_absolute_paths
from sam_cache.errors import UsageError
from sam_cache.stages.codec_trial import CANDIDATES, CODECS, EXACT, Values
from sam_cache.stages.scoring import SCORES

# What may change when the same command is given once more; all else would be another table.
FREE = {"out", "seeds", "bound", "device", "as_json"}


@dataclass(frozen=True)
class Findings:
    """`calibration.json`: measurements by codec, scores by seed, and in the end the table.

    A type that some row does not fit is left out of the table: it could not store these images.
    """

    path: Path
    content: dict

    @classmethod
    def open(cls, cfg: CalibrateConfig) -> "Findings":
        """Those in --out, if they are of the same configuration. Raises UsageError naming what differs."""
        settings = with_absolute_paths(cfg).model_dump(mode="json", by_alias=True, exclude=FREE)
        path = cfg.out / "calibration.json"
        if not path.exists():
            durable.make_folders(cfg.out)
            return cls(path, {"settings": settings, "codecs": {}, "scores": {}, "failed": {}})
        content = json.loads(path.read_text())
        before = content["settings"]
        if differing := [
            f"{name} was {before.get(name)!r}, is {settings.get(name)!r}"
            for name in before | settings
            if before.get(name) != settings.get(name)
        ]:
            raise UsageError(f"--out {cfg.out}: it holds another table: {'; '.join(differing)}; choose another --out")
        return cls(path, content)

    def note_shape(self, shape: Sequence[int]) -> None:
        self._note("shape", list(shape))

    def note_codec(self, values: Values, codec: str, measured: dict) -> None:
        if failed := measured.get("failed"):
            self.note_failure(values, failed)
        else:
            self._note("codecs", self.content["codecs"] | {f"{values.name} {codec}": measured})

    def note_failure(self, values: Values, rows: int) -> None:
        """So many rows do not fit."""
        self._note("failed", self.content["failed"] | {values.name: rows})

    def note_score(self, values: Values, seed: int, scores: dict) -> None:
        self._note("scores", self.content["scores"] | {f"{values.name} {seed}": scores})

    def measured(self, values: Values, codec: str) -> bool:
        return values.name in self.content["failed"] or f"{values.name} {codec}" in self.content["codecs"]

    def scored(self, values: Values, seed: int) -> bool:
        return values.name in self.content["failed"] or f"{values.name} {seed}" in self.content["scores"]

    def report(self, seeds: Sequence[int], bound: float) -> dict:
        """All of it with the table, whose rows grow, the noise of the seeds, and the row to choose.

        A loss is the mean over seeds of what fp32 scores more than this type with the same seed. Rates are in MB of
        fp32 values, so that they compare whatever the type.
        """
        exact = self._scores(EXACT, seeds)
        row_bytes = 4 * prod(self.content["shape"])
        table = []
        for values in (each for each in CANDIDATES if each.name not in self.content["failed"]):
            pairs = list(zip(exact, self._scores(values, seeds), strict=True))
            losses = {f"{name}_loss": statistics.fmean(one[name] - two[name] for one, two in pairs) for name in SCORES}
            for codec in CODECS:
                found = self.content["codecs"][f"{values.name} {codec}"]
                rates = {f"{way}_mb_per_s": found[f"{way}_rows_per_s"] * row_bytes / 1e6 for way in ("write", "read")}
                smaller = {"times_smaller": row_bytes / found["bytes_per_row"]}
                about = {"values": values.name, "codec": codec, "flags": values.flags(codec)}
                table.append(about | found | rates | smaller | losses)
        table.sort(key=lambda row: row["bytes_per_row"])
        noise = {name: statistics.stdev(one[name] for one in exact) if len(exact) > 1 else None for name in SCORES}
        for row in table:
            row["within_noise"] = None if noise["iou"] is None else row["iou_loss"] <= noise["iou"]
        chosen = smallest_under(table, bound)
        self.content.update(bound=bound, seeds=list(seeds), seed_noise=noise, table=table, chosen=chosen)
        self._write()
        return self.content

    def _scores(self, values: Values, seeds: Sequence[int]) -> list[dict]:
        return [self.content["scores"][f"{values.name} {seed}"] for seed in seeds]

    def _note(self, part: str, value: object) -> None:
        self.content[part] = value
        self._write()

    def _write(self) -> None:
        durable.replace(self.path, (json.dumps(self.content, indent=2) + "\n").encode())


def smallest_under(table: list[dict], bound: float) -> dict | None:
    """The row of fewest bytes that loses no more mean IoU than `bound`; None without any."""
    return min((row for row in table if row["iou_loss"] <= bound), key=lambda row: row["bytes_per_row"], default=None)


def print_table(report: dict) -> None:
    """The table, and the scores that its losses are of."""
    exact = [report["scores"][f"{EXACT.name} {seed}"] for seed in report["seeds"]]
    mean = {name: statistics.fmean(one[name] for one in exact) for name in SCORES}
    title = (
        f"{report['settings']['model']}, level {'x'.join(map(str, report['shape']))}, {exact[0]['images']} held-out "
        f"images, {len(exact)} seeds: fp32 scores IoU {mean['iou']:.4f}, boundary IoU {mean['boundary_iou']:.4f}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("values", "codec"):
        table.add_column(column)
    for column in ("bytes/row", "smaller", "MB/s in", "MB/s out", "error", "IoU loss", "boundary", "in noise"):
        table.add_column(column, justify="right")
    chosen = report["chosen"]
    for row in report["table"]:
        within = {None: "-", True: "yes", False: "no"}[row["within_noise"]]
        cells = (
            row["values"], row["codec"], f"{row['bytes_per_row']:,.0f}", f"{row['times_smaller']:.2f}x",
            f"{row['write_mb_per_s']:,.0f}", f"{row['read_mb_per_s']:,.0f}", f"{row['error']:.1e}",
            f"{row['iou_loss']:+.4f}", f"{row['boundary_iou_loss']:+.4f}", within,
        )  # fmt: skip
        table.add_row(*cells, style="bold" if row is chosen else None)
    Console(width=None if Console().is_terminal else 120).print(table)
    for name, rows in report["failed"].items():
        print(f"{name}: left out, {rows} images have values that it cannot hold")


def verdict(report: dict) -> str:
    """What the table comes to, in a sentence."""
    chosen, bound, noise = report["chosen"], report["bound"], report["seed_noise"]["iou"]
    smaller = [row for row in report["table"] if row["values"] != EXACT.name]
    if chosen is None or chosen["values"] == EXACT.name:
        least = min(smaller, key=lambda row: row["iou_loss"])
        return (
            f"nothing but fp32 stays under --bound {bound:g}: the least loss is {least['iou_loss']:.4f}, that of "
            f"{least['values']}; raise --bound, or --seeds and --steps where that is noise"
        )
    if noise is None:
        whether = "one seed does not tell what is noise"
    else:
        whether = f"{'within' if chosen['within_noise'] else 'beyond'} the seed noise of {noise:.4f}"
    return (
        f"smallest under --bound {bound:g}: {chosen['values']}, {chosen['codec']}, "
        f"{chosen['times_smaller']:.1f}x smaller than fp32; it loses {chosen['iou_loss']:.4f} mean IoU ({whether}): "
        f"samcache embed {chosen['flags']}"
    )
