"""Score a run beside untouched SAM: per prompt kind and object size, as AP, and in pictures."""

import json
import time
from pathlib import Path

import numpy as np
import torch

from sam_cache.config import EvalConfig
from sam_cache.data import parse_prompts
from sam_cache.errors import CheckpointError, DatasetError, UsageError
from sam_cache.evaluation import Scores, average_precision, compare, summarise
from sam_cache.model import Top, levels_of, load_encoder, load_top, top_from_bytes
from sam_cache.pictures import save_png
from sam_cache.ranks import Ranks
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.device import pick_device, pick_mask_budget
from sam_cache.stages.exam import Data
from sam_cache.stages.progress import Bar, say
from sam_cache.stages.report import draw_answers, print_report, to_detection
from sam_cache.stages.scoring import ask
from sam_cache.stages.sets import summarise_sets
from sam_cache.stages.train_full import open_data as open_live_data
from sam_cache.stages.tuned_sam import config_of, open_base, open_tuned, open_tuned_top, stage_of
from sam_cache.store import EmbeddingStore
from sam_cache.training import RunFolder

UNTOUCHED, TUNED = "untouched", "tuned"
STORE = Path("emb.zarr")


def evaluate(cfg: EvalConfig) -> int:
    """Evaluate and report; returns 0. Held-out rows are those the run recorded, else drawn anew."""
    device = pick_device(cfg.device, Ranks.from_env())
    data, networks = open_exam(cfg, device)
    rows = data.held_out if cfg.rows == "held-out" else data.rows
    kinds, mask_budget = parse_prompts(cfg.prompts).kinds, pick_mask_budget(cfg.mask_budget, device)
    out = cfg.out or Path(f"runs/eval-{time.strftime('%Y%m%d-%H%M%S')}")
    out.mkdir(parents=True, exist_ok=True)

    scores: dict[str, list] = {name: [] for name in networks}
    detections: dict[tuple[str, str], list[dict]] = {}
    drawn: list[Path] = []
    answered: list[int] = []
    image_ids: list[int] = []  # of these rows
    with Bar("evaluating", len(rows), "images") as bar:
        for by_kind in ask(networks, data, rows.tolist(), kinds, cfg.seed, mask_budget, device):
            bar.advance()
            first = next(iter(by_kind.values()))[0]
            answered.append(first.row)
            image_ids.append(first.scores[UNTOUCHED].image)
            for kind, answers in by_kind.items():
                for name in networks:
                    scores[name] += [answer.scores[name] for answer in answers]
                    if cfg.average_precision:
                        found = [to_detection(answer, name) for answer in answers]
                        detections.setdefault((name, kind), []).extend(found)
                if len(answered) <= cfg.overlays:
                    path = out / "overlays" / f"{kind}-row{answers[0].row:06d}.png"
                    save_png(path, draw_answers(data.picture(answers[0].row), answers))
                    drawn.append(path)
    data.report_problems()
    if not scores[UNTOUCHED]:
        raise DatasetError(f"{data.where}: no {cfg.rows} image has an object to ask for; try --rows all")

    columns = {name: Scores.of(rows) for name, rows in scores.items()}
    report = {
        "data": data.where,
        "run": str(cfg.run) if cfg.run else None,
        "view": data.view,
        "rows": {"which": cfg.rows, "count": len(answered), "images": data.names(np.array(answered))},
        "which": cfg.which if cfg.run else None,
        "hq_output": networks[TUNED].hq if TUNED in networks else None,
        "seed": cfg.seed,
        **{name: summarise(column, cfg.seed) for name, column in columns.items()},
    }
    if TUNED in columns:
        report["gain"] = compare(columns[TUNED], columns[UNTOUCHED], cfg.seed)
    report |= summarise_sets(columns, dict(zip(image_ids, data.sets_of(np.array(answered)), strict=True)), cfg.seed)
    if cfg.average_precision:
        truth = data.ground_truth(np.array(answered))
        report["average_precision"] = {}
        for (name, kind), found in detections.items():
            report["average_precision"].setdefault(kind, {})[name] = average_precision(truth, found, data.style)
    for path in [out / "report.json", *([cfg.json_file] if cfg.json_file else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)
    say(f"wrote {out / 'report.json'}" + (f" and {len(drawn)} overlays such as {drawn[0]}" if drawn else ""))
    return 0


def open_exam(cfg: EvalConfig, device: torch.device) -> tuple[Data, dict[str, Top]]:
    """What to score on, and the networks: untouched SAM, and the run's best checkpoint beside it."""
    run = RunFolder.open(cfg.run) if cfg.run else None
    if run is not None and stage_of(run) == "train-full":
        data, networks = open_live(cfg, run)
    else:
        data, networks = open_cached(cfg, run)
    return data, {name: network.to(device).eval() for name, network in networks.items()}


def open_live(cfg: EvalConfig, run: RunFolder) -> tuple[Data, dict[str, Top]]:
    """The images that a run of train-full was given, and its networks, each with its own encoder."""
    if cfg.store is not None:
        raise UsageError(
            f"--store {cfg.store}: {run.path} trained its encoder, whose embeddings no store has; leave it"
        )
    if cfg.hq_output is not None:
        raise UsageError(f"--hq-output {cfg.hq_output}: {run.path} has no HQ head; leave it")
    if cfg.view is not None:
        raise UsageError(f"--view {cfg.view}: a run of train-full is scored on the images themselves; leave it")
    if cfg.annotations is not None:
        raise UsageError(f"--annotations {cfg.annotations}: a run of train-full is scored on its own dataset; leave it")
    record = run.read_json("record.json")
    knobs = config_of(run)
    if cfg.root is not None:
        knobs = knobs.model_copy(update={"root": cfg.root})
    data = open_live_data(knobs, record["input_size"]).holding_out(record["trained"], record["held_out"])
    return data, {UNTOUCHED: open_base(run, cfg.checkpoint), TUNED: open_tuned(run, cfg.which, cfg.checkpoint)}


def open_cached(cfg: EvalConfig, run: RunFolder | None) -> tuple[CachedData, dict[str, Top]]:
    """The store to score on, its held-out rows those of the run where it knows them; and the networks.

    Beside untouched SAM that is what the run made of it, or what --checkpoint holds.
    """
    if cfg.root is not None:
        raise UsageError(f"--root {cfg.root}: is for a run of train-full; a store has all that is needed, leave it")
    if run is not None and cfg.checkpoint is not None:
        raise UsageError(f"--checkpoint {cfg.checkpoint}: {run.path} has the weights to score; give one of the two")
    store, record = cfg.store or STORE, run.read_json("record.json") if run else {}
    given = open_checkpoint(cfg, store) if cfg.checkpoint else None
    data = CachedData.open(
        store,
        annotations=cfg.annotations,
        partial=cfg.partial,
        held_out=cfg.held_out,
        seed=cfg.seed,
        levels=given.levels if given else levels_of(record.get("hq")),
        view=cfg.view,
    )
    data.say_what_is_scored()
    if run is not None:
        data.check_encoder(record["identity"], str(run.path))
        given = open_tuned_top(run, cfg.which, data.store, cfg.hq_output)
        if set(record["trained"] + record["held_out"]) & set(data.names(data.rows)):
            data = data.holding_out(record["trained"], record["held_out"])
        else:
            say(f"{run.path} was trained on other images; held-out rows are drawn by --held-out and --seed")
    if cfg.hq_output and (given is None or given.hq is None):
        raise UsageError(f"--hq-output {cfg.hq_output}: is for a --run or --checkpoint with the HQ head; leave it")
    return data, {UNTOUCHED: top_from_bytes(data.store.base)} | ({TUNED: given} if given else {})


def open_checkpoint(cfg: EvalConfig, store: Path) -> Top:
    """The prompt encoder and mask decoder of a file, such as HQ-SAM's own, for a store of the same encoder."""
    spec = EmbeddingStore.open(store).spec
    found = load_encoder(spec.encoder, cfg.checkpoint).digest
    if found != spec.encoder_sha256:
        raise CheckpointError(
            f"{cfg.checkpoint}: its encoder is not the one {store} was made with "
            f"({found[:12]} != {spec.encoder_sha256[:12]}); embed with it into another --store"
        )
    return load_top(spec.encoder, cfg.checkpoint, spec.preprocessing["input_size"], cfg.hq_output or "sum")
