"""The promise: a training step from the cache is the step with the live encoder."""

from dataclasses import replace

import pytest
import torch

from sam_cache.batches import CachedBatches, Order, Preprocessing, Sampling, pixel_batches
from sam_cache.config import DatasetKnobs
from sam_cache.data import parse_prompts
from sam_cache.model import add_head, load_encoder, top_from_bytes
from sam_cache.stages.cached_data import CachedData
from sam_cache.stages.decoding import SamObjective
from sam_cache.stages.source import open_source
from sam_cache.store import EmbeddingStore
from sam_cache.training import LossWeights


def step_gradients(store, levels_of, hq=None):
    """Loss and gradients of one step on a batch whose levels `levels_of(batch)` gives."""
    top = top_from_bytes(EmbeddingStore.open(store).base)
    top = add_head(top, hq, seed=0) if hq else top
    data = CachedData.open(store, annotations=None, partial=False, held_out=0, seed=0, levels=top.levels)
    sampling = Sampling(parse_prompts("point,box,none,point+3-1,noise-mask"), seed=1, training=True)
    annotator = data.annotator(top.size.mask_size, sampling)
    batches = CachedBatches(data.store, annotator, Order(data.train, seed=0), batch_size=2, levels=top.levels)
    batch = next(iter(batches))
    assert 0 < batch.prompts.has_mask.sum() < len(batch.prompts)
    batch = replace(batch, levels=batch.levels | levels_of(batch))
    loss = next(SamObjective(LossWeights())(top, replace(batch, levels=top.encode(batch))))["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in top.named_parameters() if p.grad is not None}


@pytest.fixture
def live():
    """Runs the encoder on the images of a batch, as a step without a cache would."""
    encoder = load_encoder("tiny", levels=("neck", "early"))
    dataset = open_source(DatasetKnobs(dataset="synthetic", scenes=4))

    @torch.no_grad()
    def levels_of(batch):
        rows = [(int(row), int(row)) for row in batch.rows]
        pixels = [next(pixel_batches(dataset, [pair], Preprocessing(128), 1, 1)) for pair in rows]
        found = [encoder(image.pixels, image.content_hw) for image in pixels]
        return {name: torch.cat([levels[name] for levels in found]) for name in encoder.levels}

    return levels_of


@pytest.mark.parametrize("hq", [None, "hq", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 0.0), ("fp16", 2e-3), ("bf16", 2e-2), ("int8", 2e-2)])
def test_one_step(samcache, tmp_path, live, dtype, tolerance, hq):
    levels = "neck,early" if hq else "neck"
    samcache("embed", "--dataset", "synthetic", "--scenes", 4, "--model", "tiny", "--store", "s.zarr", "--dtype", dtype,
             "--levels", levels)  # fmt: skip
    cached_loss, cached = step_gradients(tmp_path / "s.zarr", lambda batch: {}, hq)
    live_loss, lived = step_gradients(tmp_path / "s.zarr", live, hq)
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
