"""A batch of all sorts of prompts through the network, and what a loss of points is told."""

import json

import pytest
import torch
from torch import nn

from sam_cache.errors import UsageError
from sam_cache.model import Masks, load_top
from sam_cache.stages.decoding import SamObjective, predict
from sam_cache.training import LossWeights
from sam_cache.types import Batch, Prompts, Targets

CELLS = 32  # of the tiny model's masks
SHORT = ("--steps", 2, "--evaluate-every", 2, "--evaluate-images", 1, "--max-objects", 3, "--warmup", 0)


class OneMask(nn.Module):
    """A network that answers every prompt with one mask, as the HQ head does."""

    def __init__(self):
        super().__init__()
        self.top = load_top("tiny")
        self.size = self.top.size

    def forward(self, levels, prompts, multimask, cells=None) -> Masks:
        return self.top(levels, prompts, False, cells)


def make_batch() -> Batch:
    """Two points, two boxes and two masks about two images, in turn."""
    count = 6
    has_point, has_mask = torch.arange(count) % 3 == 0, torch.arange(count) % 3 == 2
    prompts = Prompts(
        image_index=torch.arange(count) % 2,
        kind=torch.zeros(count, dtype=torch.long),
        points_xy_input=torch.rand(2, 2) * 128,
        labels=torch.ones(2, dtype=torch.long),
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), has_point.long().cumsum(0)]),
        boxes_xyxy_input=torch.tensor([[10.0, 20, 90, 100]]).repeat(count, 1),
        has_box=torch.arange(count) % 3 == 1,
        has_mask=has_mask,
        chance=torch.rand(count, 2),
        masks=torch.randn(count, CELLS, CELLS) * has_mask[:, None, None],
    )
    targets = Targets((torch.rand(count, CELLS, CELLS) > 0.5).float(), torch.ones(2, CELLS, CELLS), torch.ones(count))
    levels = {"neck": torch.randn(2, 32, 8, 8)}
    return Batch(levels, prompts, targets, torch.arange(2).numpy(), torch.arange(count).numpy())


@pytest.mark.parametrize("network", [lambda: load_top("tiny"), OneMask])
def test_prompts_are_answered_in_their_order_whatever_they_are(network):
    network, batch = network(), make_batch()
    logits, scores = predict(network, batch)
    assert logits.shape == (6, CELLS, CELLS)
    for p in range(6):
        alone, score = predict(network, batch.select(torch.tensor([p])))
        torch.testing.assert_close(alone[0], logits[p], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score[0], scores[p], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["focal-dice", "points", "uncertain-points"])
@pytest.mark.parametrize("corrections", [0, 2])
def test_losses_of_one_mask_are_the_sum_over_prompts(kind, corrections):
    network, batch = OneMask(), make_batch()
    objective = SamObjective(LossWeights.of(kind), kind, corrections)
    whole = list(objective(network, batch))
    alone = [list(objective(network, batch.select(torch.tensor([p])))) for p in range(6)]
    assert len(whole) == corrections + 1
    # Later rounds click where a mask errs, which in a batch may be another cell by rounding.
    for name, value in whole[0].items():
        expected = sum(float(rounds[0][name].detach()) for rounds in alone)
        assert float(value.detach()) == pytest.approx(expected, rel=1e-4)
    for losses in whole:
        losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in network.top.mask_decoder.transformer.parameters())


class Telling(nn.Module):
    """A network that notes how it was asked, and can be made to answer with whole maps all the same."""

    def __init__(self, whole=False):
        super().__init__()
        self.top, self.whole, self.asked = load_top("tiny"), whole, []
        self.size = self.top.size

    def forward(self, levels, prompts, multimask, cells=None) -> Masks:
        self.asked.append(None if cells is None else cells.shape[1])
        if cells is None or not self.whole:
            return self.top(levels, prompts, multimask, cells)
        masks = self.top(levels, prompts, multimask)
        return masks._replace(logits=masks.logits.flatten(2).take_along_dim(cells[:, None], dim=2))


@pytest.mark.parametrize("corrections", [0, 2])
def test_points_are_decoded_alone_and_have_the_gradients_of_whole_maps(corrections):
    batch, found = make_batch(), []
    for network in (Telling(), Telling(whole=True)):
        sums = {}
        for losses in SamObjective(LossWeights.of("points"), "points", corrections, 100)(network, batch):
            losses["loss"].backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach()
        found.append((sums, {name: p.grad for name, p in network.top.named_parameters() if p.grad is not None}))
        # Points and others apart, later all with masks; only what another round is told is a whole map.
        assert network.asked == {0: [100, 100], 2: [None, None, None, 100]}[corrections]
    (cells, at_cells), (maps, of_maps) = found
    torch.testing.assert_close(cells, maps, rtol=1e-5, atol=1e-6)
    assert at_cells.keys() == of_maps.keys()
    largest = max(grad.norm() for grad in of_maps.values())
    for name, grad in of_maps.items():
        assert (at_cells[name] - grad).norm() <= 1e-5 * max(grad.norm(), 1e-3 * largest), name


def test_points_of_a_chunk_are_those_of_the_whole():
    network, batch = load_top("tiny"), make_batch()
    objective = SamObjective(LossWeights.of("points"), "points")
    whole = next(objective(network, batch))
    chunks = [next(objective(network, chunk)) for chunk in batch.chunks(2)]
    assert len(chunks) == 3
    for name, value in whole.items():
        assert float(value.detach()) == pytest.approx(sum(float(chunk[name].detach()) for chunk in chunks), rel=1e-5)


def test_points_of_a_loss_are_as_many_as_asked_for():
    network, batch = load_top("tiny"), make_batch()
    weights = LossWeights.of("uncertain-points")
    few, usual, default = (
        float(next(SamObjective(weights, "uncertain-points", points=points)(network, batch))["loss"].detach())
        for points in (50, 12544, None)
    )
    assert few != usual
    assert usual == pytest.approx(default, rel=1e-6)


@pytest.mark.parametrize("kind", ["focal-dice", "bce-iou"])
def test_a_loss_of_whole_masks_is_given_no_points(kind):
    with pytest.raises(
        UsageError, match=f"--loss-points 100: {kind} reads whole masks; use --loss points or uncertain"
    ):
        SamObjective(LossWeights.of(kind), kind, points=100)


def test_points_for_the_wrong_loss_are_noticed_before_a_run_begins(samcache, scenes, tmp_path, capsys):
    assert samcache("train-top", "--store", scenes, *SHORT, "--loss-points", 100, "--out", "run") == 2
    assert "--loss-points 100: focal-dice" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["train-top", "train-full"])
def test_noise_masks_are_trained_with_and_evaluated(samcache, scenes, tmp_path, stage):
    data = ("--store", scenes) if stage == "train-top" else ("--dataset", "synthetic", "--scenes", 6, "--model", "tiny")
    assert samcache(stage, *data, *SHORT, "--prompts", "box,noise-mask", "--loss", "uncertain-points",
                    "--loss-points", 300, "--best-by", "iou/noise-mask", "--out", "run") == 0  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [found for found in metrics if "bce" in found]
    assert len(steps) == 2
    assert all(found["loss"] > found["dice"] > 0 for found in steps)
    assert samcache("eval", "--run", "run", *(data[:2] if stage == "train-top" else ()), "--rows", "all",
                    "--prompts", "noise-mask,box", "--overlays", 1, "--json", "scores.json") == 0  # fmt: skip
    scores = json.loads((tmp_path / "scores.json").read_text())
    found = scores["untouched"]["noise-mask"]["all"], scores["untouched"]["box"]["all"]
    assert found[0]["objects"] == found[1]["objects"] > 0
    assert found[0]["iou"] != found[1]["iou"]
