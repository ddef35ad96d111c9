"""The promise: a training step from the cache is the step with the live encoder."""

import pytest
import torch

from sam_cache.batches import CachedBatches, Order, Preprocessing, Sampling, pixel_batches
from sam_cache.config import DatasetKnobs
from sam_cache.data import parse_prompts
from sam_cache.model import load_encoder, top_from_bytes
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.source import open_source
from sam_cache.training import LossWeights


def step_gradients(store, levels_of):
    """Loss and gradients of one step on a batch whose levels `levels_of(batch)` gives."""
    data = CachedData.open(store, annotations=None, partial=False, held_out=0, seed=0)
    top = top_from_bytes(data.store.base)
    sampling = Sampling(parse_prompts("point,box,none,point+3-1"), seed=1, training=True)
    annotator = data.annotator(top.size.mask_size, sampling)
    batches = CachedBatches(data.store, annotator, Order(data.train, seed=0), batch_size=2)
    batch = next(iter(batches))
    batch.levels.update(levels_of(batch))
    loss = next(SamObjective(LossWeights())(top, batch))["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in top.named_parameters() if p.grad is not None}


@pytest.fixture
def live():
    """Runs the encoder on the images of a batch, as a step without a cache would."""
    encoder = load_encoder("tiny")
    dataset = open_source(DatasetKnobs(dataset="synthetic", scenes=4))

    @torch.no_grad()
    def levels_of(batch):
        rows = [(int(row), int(row)) for row in batch.rows]
        pixels = [next(pixel_batches(dataset, [pair], Preprocessing(128), 1, 1)) for pair in rows]
        necks = [encoder(found.pixels, found.content_hw)["neck"] for found in pixels]
        return {"neck": torch.cat(necks)}

    return levels_of


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_one_step(samcache, tmp_path, live, dtype, tolerance):
    samcache("embed", "--dataset", "synthetic", "--scenes", 4, "--model", "tiny", "--store", "s.zarr", "--dtype", dtype)
    cached_loss, cached = step_gradients(tmp_path / "s.zarr", lambda batch: {})
    live_loss, lived = step_gradients(tmp_path / "s.zarr", live)
    assert cached.keys() == lived.keys()
    if tolerance == 0:
        assert torch.equal(cached_loss, live_loss)
        assert all(torch.equal(cached[name], lived[name]) for name in cached)
    else:
        assert not torch.equal(cached_loss, live_loss)  # the types do differ, so the bound says something
        assert torch.allclose(cached_loss, live_loss, rtol=tolerance)
        whole = torch.cat([gradient.flatten() for gradient in lived.values()])
        difference = whole - torch.cat([cached[name].flatten() for name in lived])
        assert difference.norm() < 10 * tolerance * whole.norm()
