from collections.abc import Callable, Sequence

import pytest
import torch
from segment_anything.modeling.common import LayerNorm2d
from torch import Tensor, nn

from sam_cache.model import SIZES, Encoder, Top, fixed_weights, load_encoder, load_top
from sam_cache.types import Prompts


@pytest.fixture(scope="session")
def redraw() -> Callable[[nn.Module, int], None]:
    """Redraw every parameter: normal with std .02, normalisation weights 1 + .1 normal.

    Upstream starts positions and biases at zero, and would not notice them swapped or missing.
    """

    def redraw(module: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for layer in module.modules():
            for name, parameter in layer.named_parameters(recurse=False):
                draw = torch.randn(parameter.shape, generator=generator)
                scales = name == "weight" and isinstance(layer, (nn.LayerNorm, LayerNorm2d))
                parameter.data = 1 + 0.1 * draw if scales else 0.02 * draw

    return redraw


@pytest.fixture(scope="session")
def relative() -> Callable[[Tensor, Tensor], float]:
    """The largest difference, in standard deviations of the expected tensor."""
    return lambda found, expected: ((found - expected).abs().max() / expected.std()).item()


@pytest.fixture
def tiny_state() -> dict[str, Tensor]:
    return fixed_weights(SIZES["tiny"])


@pytest.fixture
def encoder(redraw) -> Encoder:
    """The tiny one, with weights so large that every layer counts: redrawn ones are small."""
    encoder = load_encoder("tiny")
    redraw(encoder, seed=5)
    for parameter in encoder.parameters():
        parameter.data *= 3
    return encoder


@pytest.fixture
def pixels() -> Tensor:
    """Two images of the tiny encoder's input size."""
    side = SIZES["tiny"].input_size
    return torch.randint(0, 256, (2, 3, side, side), generator=torch.Generator().manual_seed(6)).byte()


@pytest.fixture
def tiny_top(redraw) -> Top:
    top = load_top("tiny")
    redraw(top, seed=1)
    return top


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., Prompts]:
    """Prompts from (image index, number of points, has a box) triples, with random coordinates."""

    def make_prompts(specs: Sequence[tuple[int, int, bool]], input_size: int, seed: int = 0) -> Prompts:
        generator = torch.Generator().manual_seed(seed)
        counts = torch.tensor([count for _, count, _ in specs], dtype=torch.long)
        corners = torch.rand(len(specs), 2, 2, generator=generator).sort(dim=1).values * input_size
        return Prompts(
            image_index=torch.tensor([image for image, _, _ in specs], dtype=torch.long),
            kind=torch.zeros(len(specs), dtype=torch.long),
            points_xy_input=torch.rand(int(counts.sum()), 2, generator=generator) * input_size,
            labels=torch.randint(0, 2, (int(counts.sum()),), generator=generator),
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            boxes_xyxy_input=corners.flatten(1),
            has_box=torch.tensor([box for _, _, box in specs], dtype=torch.bool),
            has_mask=torch.zeros(len(specs), dtype=torch.bool),
            chance=torch.rand(len(specs), 2, generator=generator),
        )

    return make_prompts


@pytest.fixture(scope="session")
def decode_one_by_one() -> Callable[[Top, Tensor, Prompts, bool], tuple[Tensor, Tensor]]:
    """The oracle: upstream's modules, one image and one prompt per call."""

    def decode_one_by_one(top: Top, neck: Tensor, prompts: Prompts, multimask: bool) -> tuple[Tensor, Tensor]:
        logits, scores = [], []
        for p in range(len(prompts)):
            prompt = prompts.select(torch.tensor([p]))
            points = (prompt.points_xy_input[None], prompt.labels[None]) if len(prompt.labels) else None
            boxes = prompt.boxes_xyxy_input if prompt.has_box[0] else None
            sparse, dense = top.prompt_encoder(
                points=points, boxes=boxes, masks=prompt.masks[:, None] if prompt.has_mask[0] else None
            )
            masks, iou = top.mask_decoder(
                image_embeddings=neck[prompt.image_index],
                image_pe=top.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=multimask,
            )
            logits.append(masks)
            scores.append(iou)
        return torch.cat(logits), torch.cat(scores)

    return decode_one_by_one
