"""HQ-SAM of ViT-B at full size, from a file in the official layout, against segment_anything_hq's predictor."""

import numpy as np
import pytest
import torch

from sam_cache.model import SIZES, load_sam
from sam_cache.model.export import import_upstream, load_upstream
from sam_cache.model.parts import outline
from sam_cache.types import Prompts

pytestmark = pytest.mark.slow

POINT, BOXES = np.array([[100.0, 200.0]]), np.array([[20.0, 30.0, 333.0, 222.0], [200.0, 50.0, 460.0, 290.0]])


@pytest.fixture(scope="module")
def both(tmp_path_factory, redraw):
    """Ours and the package's, both from one file, with an image set; and that image's levels."""
    path = tmp_path_factory.mktemp("checkpoints") / "sam_hq_vit_b.pth"
    modules = outline(SIZES["vit_b"], hq=True).to_empty(device="cpu")
    redraw(modules, seed=7)
    gaussian = modules["prompt_encoder"].pe_layer.positional_encoding_gaussian_matrix
    gaussian.copy_(torch.randn(gaussian.shape, generator=torch.Generator().manual_seed(8)))
    torch.save(modules.state_dict(), path)
    sam = load_sam("vit_b", path, hq="hq").eval()
    predictor = import_upstream(hq=True).SamPredictor(load_upstream(SIZES["vit_b"], path, hq=True))
    path.unlink()
    rows, columns = np.mgrid[:300, :471] / 300
    image = np.stack([rows, columns % 1, np.sin(20 * rows * columns) / 2 + 0.5], axis=-1) * 200
    image = (image + np.random.default_rng(8).uniform(0, 55, image.shape)).astype(np.uint8)
    predictor.set_image(image)
    resized = torch.from_numpy(predictor.transform.apply_image(image)).permute(2, 0, 1)
    side = sam.size.input_size
    pixels = torch.zeros((1, 3, side, side), dtype=torch.uint8)
    pixels[0, :, : resized.shape[1], : resized.shape[2]] = resized
    with torch.no_grad():
        levels = sam.image_encoder(pixels, torch.tensor([resized.shape[1:]]))
    return sam, predictor, levels


def test_early_level(both, relative):
    _, predictor, levels = both
    assert levels["early"].shape == (1, 768, 64, 64)
    assert relative(levels["early"], predictor.interm_features[0].permute(0, 3, 1, 2)) < 1e-4
    assert relative(levels["neck"], predictor.features) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("mode", ["hq", "sum"])
def test_masks_of_several_prompts(both, relative, mode, multimask):
    """Two boxes in one call there; here they share a batch with a point, which is asked by itself there."""
    sam, predictor, levels = both
    sam.hq = mode
    transform, size = predictor.transform, predictor.original_size
    boxes = torch.from_numpy(transform.apply_boxes(BOXES, size)).float()
    point = torch.from_numpy(transform.apply_coords(POINT, size)).float()
    ask = {"multimask_output": multimask, "hq_token_only": mode == "hq", "return_logits": True}
    *_, of_boxes = predictor.predict_torch(point_coords=None, point_labels=None, boxes=boxes, **ask)
    labels = torch.ones(1, 1, dtype=torch.long)
    *_, of_point = predictor.predict_torch(point_coords=point[None], point_labels=labels, boxes=None, **ask)
    prompts = Prompts(
        image_index=torch.zeros(3, dtype=torch.long),
        kind=torch.zeros(3, dtype=torch.long),
        points_xy_input=point,
        labels=torch.ones(1, dtype=torch.long),
        offsets=torch.tensor([0, 0, 1, 1]),
        boxes_xyxy_input=torch.stack([boxes[0], torch.zeros(4), boxes[1]]),
        has_box=torch.tensor([True, False, True]),
        has_mask=torch.zeros(3, dtype=torch.bool),
        chance=torch.zeros(3, 2),
    )
    found = sam(sam.prepare(levels), prompts, multimask).logits
    assert relative(found[[0, 2]], of_boxes) < 1e-4
    assert relative(found[1:2], of_point) < 1e-4
