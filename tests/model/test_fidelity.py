"""ViT-B at full size, from an official-layout file, against `SamPredictor`; and the cached training step."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamPredictor, sam_model_registry
from torch import Tensor

from sam_cache.model import SIZES, Encoder, Top, fixed_weights, load_encoder, load_top, masks_to_image
from sam_cache.types import Prompts

pytestmark = pytest.mark.slow


class Fidelity(NamedTuple):
    predictor: SamPredictor  # upstream, with the image set
    encoder: Encoder
    top: Top
    pixels: Tensor
    content_hw: Tensor
    neck: Tensor


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, redraw):
    sam = sam_model_registry["vit_b"]()
    redraw(sam, seed=7)
    path = tmp_path_factory.mktemp("checkpoints") / "sam_vit_b_01ec64.pth"
    torch.save(sam.state_dict(), path)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def model(checkpoint):
    sam = sam_model_registry["vit_b"]()
    sam.load_state_dict(torch.load(checkpoint, weights_only=True))
    return SamPredictor(sam.eval()), load_encoder("vit_b", checkpoint), load_top("vit_b", checkpoint)


def embed_both(model, image: np.ndarray) -> Fidelity:
    predictor, encoder, top = model
    predictor.set_image(image)
    resized = torch.from_numpy(predictor.transform.apply_image(image)).permute(2, 0, 1)
    side = encoder.size.input_size
    height, width = resized.shape[1:]
    pixels = torch.full((1, 3, side, side), 77, dtype=torch.uint8)  # what lies in the padding must not matter
    pixels[0, :, :height, :width] = resized
    content_hw = torch.tensor([[height, width]])
    return Fidelity(predictor, encoder, top, pixels, content_hw, encoder(pixels, content_hw)["neck"])


@pytest.fixture(scope="session")
def fidelity(model):
    rows, columns = np.mgrid[:300, :471] / 300
    image = np.stack([rows, columns % 1, np.sin(20 * rows * columns) / 2 + 0.5], axis=-1) * 200
    image += np.random.default_rng(8).uniform(0, 55, image.shape)
    return embed_both(model, image.astype(np.uint8))


POINTS = np.array([[100.5, 200.25], [300, 50]])
LABELS = np.array([1, 0])
BOX = np.array([20.0, 30.0, 333.0, 222.0])


def prompt_of(predictor: SamPredictor, points: bool, box: bool) -> Prompts:
    to_input = predictor.transform
    xy = to_input.apply_coords(POINTS, predictor.original_size)[: 2 * points]
    return Prompts(
        image_index=torch.zeros(1, dtype=torch.long),
        kind=torch.zeros(1, dtype=torch.long),
        points_xy_input=torch.tensor(xy, dtype=torch.float32),
        labels=torch.tensor(LABELS[: 2 * points]),
        offsets=torch.tensor([0, 2 * points]),
        boxes_xyxy_input=torch.tensor(to_input.apply_boxes(BOX[None], predictor.original_size)).float(),
        has_box=torch.tensor([box]),
        has_mask=torch.tensor([False]),
        chance=torch.zeros(1, 2),
    )


def test_embedding_equals_predictors(fidelity, relative):
    assert relative(fidelity.neck, fidelity.predictor.features) < 1e-4


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize(("points", "box"), [(True, False), (False, True), (True, True)])
def test_masks_equal_predictors(fidelity, relative, points, box, multimask):
    predictor = fidelity.predictor
    expected, expected_scores, expected_logits = predictor.predict(
        point_coords=POINTS if points else None,
        point_labels=LABELS if points else None,
        box=BOX if box else None,
        multimask_output=multimask,
        return_logits=True,
    )
    with torch.no_grad():
        found = fidelity.top({"neck": fidelity.neck}, prompt_of(predictor, points, box), multimask)
    assert relative(found.logits[0], torch.from_numpy(expected_logits)) < 1e-4
    np.testing.assert_allclose(found.scores[0], expected_scores, rtol=1e-4, atol=1e-6)
    content_hw = tuple(fidelity.content_hw[0].tolist())
    side = fidelity.encoder.size.input_size
    masks = masks_to_image(found.logits[0], side, content_hw, predictor.original_size)
    assert relative(masks, torch.from_numpy(expected)) < 1e-4


def test_real_image(model, real_data, relative):
    image = np.array(Image.open(real_data / "fruits_nuts" / "images" / "0.jpg").convert("RGB"))
    fidelity = embed_both(model, image)
    assert relative(fidelity.neck, fidelity.predictor.features) < 1e-4


def train_step(top: Top, neck: Tensor, prompts: Prompts) -> tuple[Tensor, dict[str, Tensor]]:
    logits, scores = top({"neck": neck}, prompts, True)
    soft = (logits / logits.std().detach()).sigmoid()  # random weights draw faint masks
    loss = (soft * soft.mean((2, 3), keepdim=True)).mean() + (scores - 0.5).square().mean()
    names, parameters = zip(*top.named_parameters(), strict=True)
    return loss, dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


def test_cached_step_equals_live_step(make_prompts, redraw):
    """fp32: the bytes of a level, read back, give the same loss and gradients bit by bit."""
    encoder, top = load_encoder("tiny"), load_top("tiny")
    redraw(encoder, seed=9)
    redraw(top, seed=10)
    side = encoder.size.input_size
    pixels = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    content_hw = torch.tensor([[side, 90], [64, side]])
    prompts = make_prompts([(1, 1, False), (0, 2, True), (1, 0, True)], side)
    row_bytes = [level.numpy().tobytes() for level in encoder(pixels, content_hw)["neck"]]
    stored = np.stack([np.frombuffer(row, np.float32).reshape(encoder.levels["neck"]) for row in row_bytes])
    live = train_step(top, encoder(pixels, content_hw)["neck"], prompts)
    cached = train_step(top, torch.from_numpy(stored), prompts)
    assert torch.equal(cached[0], live[0])
    for key, grad in live[1].items():
        assert (grad is None and cached[1][key] is None) or torch.equal(cached[1][key], grad), key


def test_step_from_fp16_storage(fidelity):
    """Full size: fp16 moves a level by up to 5e-4 of itself, loss and gradients by far less."""
    # Weights of training's usual scale: masks depend on the level as they should.
    state = fixed_weights(SIZES["nano"])
    top = Top(SIZES["nano"], {key: value for key, value in state.items() if not key.startswith("image_encoder.")})
    prompts = prompt_of(fidelity.predictor, True, False)
    live_loss, live = train_step(top, fidelity.neck, prompts)
    cached_loss, cached = train_step(top, fidelity.neck.half(), prompts)
    loss_error = ((cached_loss - live_loss) / live_loss).abs().item()
    errors = {
        key: ((cached[key] - grad).norm() / grad.norm()).item()
        for key, grad in live.items()
        if grad is not None and grad.any() and not key.endswith("k_proj.bias")  # zero but for rounding
    }
    worst = max(errors, key=errors.get)
    print(f"fp16 storage: loss {loss_error:.1e}, gradients at most {errors[worst]:.1e} ({worst})")
    assert loss_error < 1e-5
    assert errors[worst] < 5e-4
