"""Score a run beside untouched SAM: per prompt kind and object size, as AP, and in pictures."""

import json
import time
from pathlib import Path

import torch
from torch import nn

from sam_cache.config import EvalConfig
from sam_cache.data import parse_prompts
from sam_cache.errors import StoreError
from sam_cache.evaluation import Scores, average_precision, compare, summarise
from sam_cache.model import top_from_bytes
from sam_cache.pictures import save_png
from sam_cache.ranks import Ranks
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.device import pick_device, pick_mask_budget
from sam_cache.stages.progress import Bar, say
from sam_cache.stages.report import draw_answers, ground_truth, print_report, to_detection
from sam_cache.stages.scoring import ask
from sam_cache.stages.source import Pictures
from sam_cache.stages.training_setup import START
from sam_cache.training import RunFolder, load_trained

UNTOUCHED, TUNED = "untouched", "tuned"


def evaluate(cfg: EvalConfig) -> int:
    """Evaluate and report; returns 0. Held-out rows are those the run recorded, else drawn anew."""
    device = pick_device(cfg.device, Ranks.from_env())
    data = open_data(cfg)
    networks = open_networks(cfg, data, device)
    rows = data.held_out if cfg.rows == "held-out" else data.rows
    kinds, mask_budget = parse_prompts(cfg.prompts).kinds, pick_mask_budget(cfg.mask_budget, device)
    out = cfg.out or Path(f"runs/eval-{time.strftime('%Y%m%d-%H%M%S')}")
    out.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(data.store) if cfg.overlays else None

    scores: dict[str, list] = {name: [] for name in networks}
    detections: dict[tuple[str, str], list[dict]] = {}
    drawn: list[Path] = []
    with Bar("evaluating", len(rows) * len(kinds), "images") as bar:
        for kind in kinds:
            shown = 0
            for answers in ask(networks, data, rows, kind, cfg.seed, mask_budget, device):
                bar.advance()
                for name in networks:
                    scores[name] += [answer.scores[name] for answer in answers]
                    if cfg.average_precision:
                        found = [to_detection(answer, name, data) for answer in answers]
                        detections.setdefault((name, str(kind)), []).extend(found)
                if pictures and shown < cfg.overlays:
                    path = out / "overlays" / f"{kind}-row{answers[0].row:06d}.png"
                    save_png(path, draw_answers(pictures.image(answers[0].row), answers))
                    drawn.append(path)
                    shown += 1
    if not scores[UNTOUCHED]:
        raise StoreError(f"{cfg.store}: no {cfg.rows} row has an object to ask for; try --rows all")

    columns = {name: Scores.of(rows) for name, rows in scores.items()}
    report = {
        "store": str(cfg.store),
        "run": str(cfg.run) if cfg.run else None,
        "rows": {"which": cfg.rows, "count": len(rows), "images": data.names(rows)},
        "seed": cfg.seed,
        **{name: summarise(column, cfg.seed) for name, column in columns.items()},
    }
    if TUNED in columns:
        report["gain"] = compare(columns[TUNED], columns[UNTOUCHED], cfg.seed)
    if cfg.average_precision:
        truth = ground_truth(data, rows)
        style = "lvis" if (data.store.object_attributes()["dataset"] or {}).get("dataset") == "lvis" else "coco"
        report["average_precision"] = {}
        for (name, kind), found in detections.items():
            report["average_precision"].setdefault(kind, {})[name] = average_precision(truth, found, style)
    for path in [out / "report.json", *([cfg.json_file] if cfg.json_file else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)
    say(f"wrote {out / 'report.json'}" + (f" and {len(drawn)} overlays such as {drawn[0]}" if drawn else ""))
    return 0


def open_data(cfg: EvalConfig) -> CachedData:
    data = CachedData.open(
        cfg.store, annotations=cfg.annotations, partial=cfg.partial, held_out=cfg.held_out, seed=cfg.seed
    )
    if cfg.run is None:
        return data
    record = RunFolder.open(cfg.run).read_json("record.json")
    data.check_encoder(record["identity"], str(cfg.run))
    if not set(record["trained"] + record["held_out"]) & set(data.names(data.rows)):
        say(f"{cfg.run} was trained on other images; held-out rows are drawn by --held-out and --seed")
        return data
    return data.holding_out(record["trained"], record["held_out"])


def open_networks(cfg: EvalConfig, data: CachedData, device: torch.device) -> dict[str, nn.Module]:
    """Untouched SAM, and the run's best checkpoint put over a copy of it."""
    networks: dict[str, nn.Module] = {UNTOUCHED: top_from_bytes(data.store.base)}
    if cfg.run is not None:
        run = RunFolder.open(cfg.run)
        start = run.path / START
        networks[TUNED] = top_from_bytes(start.read_bytes() if start.exists() else data.store.base)
        load_trained(networks[TUNED], run.load_weights("best"), str(cfg.run))
    return {name: network.to(device).eval() for name, network in networks.items()}
