from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from torch import nn

from sam_cache.errors import CheckpointError, SamcacheError, UsageError
from sam_cache.training import Pace, Progress, RunFolder, fit, learning_rate_factor, load, make_accelerator
from sam_cache.types import Batch, Prompts, Targets


class Scale(nn.Module):
    """Predicts a mask as a learnt multiple of the level, so that gradients are easy to see."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.5, -0.2]))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def encode(self, batch):
        return batch.levels


class Encoding(Scale):
    """One that trains what makes the levels, too."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[[0.7]], [[1.3]]]))
        self.calls = 0

    def encode(self, batch):
        self.calls += 1
        return {"neck": (batch.levels["neck"] * self.gain).tanh()}


def losses_of(network, batch):
    """One round."""
    yield {"loss": error_of(network, batch)}


def error_of(network, batch):
    predicted = batch.levels["neck"][batch.prompts.image_index] * network.factor[:, None, None] * network.frozen
    error = (predicted.sum(1) - batch.targets.masks).square().mean((1, 2)) * batch.targets.weights
    return error.sum()


def make_batch(number: int, prompts: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(number)
    index = torch.sort(torch.randint(3, (prompts,), generator=generator)).values
    return Batch(
        levels={"neck": torch.randn(3, 2, 4, 4, generator=generator)},
        prompts=Prompts(
            image_index=index,
            kind=torch.zeros(prompts, dtype=torch.long),
            points_xy_input=torch.zeros(0, 2),
            labels=torch.zeros(0, dtype=torch.long),
            offsets=torch.zeros(prompts + 1, dtype=torch.long),
            boxes_xyxy_input=torch.zeros(prompts, 4),
            has_box=torch.ones(prompts, dtype=torch.bool),
            has_mask=torch.zeros(prompts, dtype=torch.bool),
            chance=torch.zeros(prompts, 2),
        ),
        targets=Targets(
            torch.rand(prompts, 4, 4, generator=generator),
            torch.ones(3, 4, 4),
            1 + torch.rand(prompts, generator=generator),
        ),
        rows=np.arange(3) + number,
        objects=np.arange(prompts),
    )


class Stream:
    def __init__(self, start: int = 0):
        self.position = start

    def __iter__(self):
        for position in count(self.position + 1):
            self.position = position
            yield self.batch_at(position)

    def batch_at(self, position):
        return make_batch(position)

    def state(self):
        return {"position": self.position}


def learning_rate_at(step):
    return 0.1 * learning_rate_factor(step, 6, warmup=2)


def train(folder, steps, *, resume=False, evaluate=lambda: {"score": 0.0}, objective=losses_of, stop_at=None,
          network=None, stream=Stream, **pace):  # fmt: skip
    network = network or Scale()
    run = RunFolder.open(folder) if resume else RunFolder.create(folder)
    run.write_json("config.json", {})
    accelerator = make_accelerator(torch.device("cpu"), "fp32", folder)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.1)
    progress, batches = Progress(), stream()
    if resume:
        progress, state = load(network, optimizer, run)
        batches = Stream(state["position"])
    pace = Pace(**({"steps": steps, "evaluate_every": 100, "save_every": 100} | pace))

    def should_stop():
        return progress.step == stop_at

    fit(
        network,
        batches,
        objective,
        evaluate,
        optimizer,
        learning_rate_at,
        run,
        accelerator,
        pace,
        progress,
        should_stop,
    )
    accelerator.end_training()
    return network, run


def test_resumed_equals_uninterrupted(tmp_path):
    """Stopped twice, in the warm-up and in the decay."""
    straight, straight_run = train(tmp_path / "straight", 6)
    train(tmp_path / "parts", 6, stop_at=1)
    train(tmp_path / "parts", 6, stop_at=4, resume=True)
    parts, parts_run = train(tmp_path / "parts", 6, resume=True)
    assert torch.equal(straight.factor, parts.factor)
    drop = ("images_per_second", "held_out/score")
    logs = [
        [{k: v for k, v in line.items() if k not in drop} for line in run.metrics()]
        for run in (straight_run, parts_run)
    ]
    assert logs[0] == logs[1]


def test_chunks_give_the_gradient_of_the_whole(tmp_path):
    """Seen before the optimizer, which would hide a wrong scale: Adam's first step has only signs."""
    _, whole = train(tmp_path / "whole", 1, mask_budget=100, clip=1e9)
    _, chunked = train(tmp_path / "chunked", 1, mask_budget=2, clip=1e9)
    for name in ("gradient_norm", "loss"):
        assert chunked.metrics()[0][name] == pytest.approx(whole.metrics()[0][name], rel=1e-6)


def test_accumulation_is_one_weighted_mean_over_all_prompts(tmp_path):
    """Two batches of unequal weight accumulate to the gradient of their concatenation."""
    network = Scale()
    window = [make_batch(1), make_batch(2)]
    total = sum(batch.targets.weights.sum() for batch in window)
    (sum(error_of(network, batch) for batch in window) / total).backward()
    expected = network.factor.grad.norm()
    _, run = train(tmp_path, 1, accumulation=2, clip=1e9)
    assert run.metrics()[0]["gradient_norm"] == pytest.approx(float(expected), rel=1e-6)


def test_rounds_add_up_to_one_step(tmp_path):
    """Each is back-propagated by itself, on the same images: the gradient is that of their sum."""

    def in_rounds(network, batch):
        for part in (0.25, 0.75):
            yield {"loss": part * error_of(network, batch)}

    for network in (Scale, Encoding):
        _, whole = train(tmp_path / f"whole-{network.__name__}", 2, network=network())
        _, parts = train(
            tmp_path / f"parts-{network.__name__}", 2, network=network(), objective=in_rounds, mask_budget=2
        )
        for one, other in zip(whole.metrics(), parts.metrics(), strict=True):
            for name in ("loss", "gradient_norm"):
                assert other[name] == pytest.approx(one[name], rel=1e-5)


def test_an_encoder_runs_once_a_batch_and_gets_the_gradient_of_all_chunks(tmp_path):
    direct = Encoding()
    batch = make_batch(1)
    (error_of(direct, replace(batch, levels=direct.encode(batch))) / batch.targets.weights.sum()).backward()
    expected = torch.cat([direct.factor.grad, direct.gain.grad.flatten()]).norm()
    for budget in (100, 2):
        network = Encoding()
        _, run = train(tmp_path / str(budget), 1, network=network, mask_budget=budget, clip=1e9)
        assert network.calls == 1
        assert run.metrics()[0]["gradient_norm"] == pytest.approx(float(expected), rel=1e-6)


def test_batches_without_an_image_are_passed_over(tmp_path):
    class Sparse(Stream):
        def batch_at(self, position):
            return make_batch(position // 2) if position % 2 == 0 else None

    dense, dense_run = train(tmp_path / "dense", 4)
    sparse, sparse_run = train(tmp_path / "sparse", 4, stream=Sparse)
    assert torch.equal(dense.factor, sparse.factor)
    assert [line["step"] for line in sparse_run.metrics()] == [1, 2, 3, 4]
    assert sparse_run.load_training()[2]["batches"] == {"position": 8}
    # In a window of two, one of them empty, the other one counts alone.
    windowed, _ = train(tmp_path / "windowed", 4, stream=Sparse, accumulation=2)
    assert torch.equal(dense.factor, windowed.factor)


def test_patience_ends_a_run_that_no_longer_gets_better(tmp_path):
    scores = iter([0.1, 0.5, 0.4, 0.45, 0.3, 0.9])
    _, run = train(tmp_path, 20, evaluate=lambda: {"score": next(scores)}, evaluate_every=2, patience=3)
    assert run.metrics()[-1]["step"] == 10
    assert (tmp_path / "best").read_text().strip() == "step-000004"


def test_another_metric_may_say_which_is_best(tmp_path):
    scores = iter([{"score": 0.9, "iou/box": 0.1}, {"score": 0.1, "iou/box": 0.9}])
    train(tmp_path / "run", 2, evaluate=lambda: next(scores), evaluate_every=1, best_by="iou/box")
    assert (tmp_path / "run" / "best").read_text().strip() == "step-000002"
    with pytest.raises(UsageError, match="--best-by"):
        train(tmp_path / "other", 1, best_by="iou/bocks")


def test_learning_rates_follow_the_scale_of_their_group(tmp_path):
    """Parameters of a group with scale 0 stay where they are."""
    network = Encoding()
    run = RunFolder.create(tmp_path)
    run.write_json("config.json", {})
    groups = [{"params": [network.factor], "scale": 1.0}, {"params": [network.gain], "scale": 0.0}]
    gain, factor = network.gain.detach().clone(), network.factor.detach().clone()
    accelerator = make_accelerator(torch.device("cpu"), "fp32", tmp_path)
    fit(network, Stream(), losses_of, lambda: {}, torch.optim.SGD(groups, lr=1), learning_rate_at, run, accelerator,
        Pace(2, 10, 10), Progress())  # fmt: skip
    accelerator.end_training()
    assert torch.equal(network.gain, gain)
    assert not torch.equal(network.factor, factor)


def test_checkpoint_holds_trained_parameters_alone_and_best_is_kept(tmp_path):
    scores = iter([0.5, 0.9, 0.1, 0.2])
    _, run = train(tmp_path, 4, evaluate=lambda: {"score": next(scores)}, evaluate_every=1, save_every=1)
    assert set(run.load_weights()) == {"factor"}
    assert (tmp_path / "best").read_text().strip() == "step-000002"
    assert (tmp_path / "last").read_text().strip() == "step-000004"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
    ]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    def objective(network, batch):
        broken = 2 in batch.rows and 1 not in batch.rows
        yield {"loss": error_of(network, batch) * (float("nan") if broken else 1.0)}

    with pytest.raises(SamcacheError, match=r"step 2: loss is nan on rows \[2, 3, 4\]"):
        train(tmp_path, 4, save_every=1, objective=objective)
    assert RunFolder.open(tmp_path).load_training()[2]["progress"]["step"] == 1


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_a_checkpoint(tmp_path, clip):
    """Weights would be saved with the finite loss of this very step, and be worth nothing."""

    def objective(network, batch):
        loss = error_of(network, batch)
        if 1 not in batch.rows:
            loss = loss + (network.factor - network.factor.detach()).abs().sqrt().sum()  # 0, with slope infinity
        yield {"loss": loss}

    with pytest.raises(SamcacheError, match=r"step 2: gradient is (nan|inf) on rows \[2, 3, 4\].* keeps step 1"):
        train(tmp_path, 4, save_every=1, objective=objective, clip=clip)
    assert RunFolder.open(tmp_path).load_weights("last")["factor"].isfinite().all()


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    train(tmp_path, 1)
    with pytest.raises(UsageError, match="--resume"):
        RunFolder.create(tmp_path)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        RunFolder.create(tmp_path).load_weights()


def test_select_keeps_prompts_with_their_images():
    batch = make_batch(7)
    part = batch.select(torch.tensor([4, 1]))
    image = batch.prompts.image_index[[4, 1]]
    assert torch.equal(part.levels["neck"][part.prompts.image_index], batch.levels["neck"][image])
    assert np.array_equal(part.rows[part.prompts.image_index], batch.rows[image])
    assert torch.equal(part.targets.masks, batch.targets.masks[[4, 1]])
    joined = [chunk.targets.masks for chunk in replace(batch).chunks(2)]
    assert torch.equal(torch.cat(joined), batch.targets.masks)
