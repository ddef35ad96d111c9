"""Weights out of here and into segment_anything or segment_anything_hq, with a proof that they mean the same there."""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import safetensors.torch
import segment_anything
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sam_cache.errors import CheckpointError, UsageError
from sam_cache.model.adapters import merge
from sam_cache.model.checkpoints import State, read_tensors
from sam_cache.model.encoder import MEAN, STD, fit_positions
from sam_cache.model.hq import HqOutput
from sam_cache.model.parts import build_image_encoder, build_mask_decoder, build_prompt_encoder, outline, part_of
from sam_cache.model.sam import Sam
from sam_cache.model.sizes import ModelSize, size_of
from sam_cache.types import Prompts

SUFFIXES = (".pth", ".safetensors")
ENCODER = "image_encoder.vit"
TOLERANCE = 1e-3  # of the logits' standard deviation; rounding alone stays a hundred times below


def fit_trained(weights: State, size: ModelSize) -> State:
    """Trained parameters of a `Sam` for its size: position tables among them are stretched to the size's grid.

    `fit_positions` says how. There and back again is close to the tables it began with, not equal to them.
    """
    tables = part_of(weights, ENCODER)
    if "pos_embed" not in tables:  # they are trained all together, or not at all
        return weights
    return weights | {f"{ENCODER}.{key}": table for key, table in fit_positions(tables, size).items()}


def official_state(sam: Sam) -> State:
    """The weights of `sam` with exactly the keys and shapes of an official checkpoint; a low-rank adapter is merged.

    With an HQ head it is the layout of segment_anything_hq.
    `sam` is at its model's own input size, and stays as it is; tensors are shared with it where they can be.
    Raises UsageError for an adapter that depends on the image, which no fixed weight can replace.
    """
    encoder = sam.image_encoder
    # A copy of the modules alone, on the same tensors: merging puts other layers into it.
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    plain = copy.deepcopy(encoder, shared)
    merge(plain)
    found = {f"image_encoder.{key}": tensor for key, tensor in plain.vit.state_dict().items()}
    found |= {key: tensor for key, tensor in sam.state_dict().items() if not key.startswith("image_encoder.")}
    return {key: found[key].detach() for key in outline(size_of(sam.size.name), sam.hq is not None).state_dict()}


def write_state(path: Path, state: State) -> None:
    """Write tensors by name, as fp32 on the CPU: a `.pth` that `torch.load` reads, or a `.safetensors`.

    Raises UsageError for another suffix.
    """
    check_suffix(path)
    tensors = {key: tensor.to("cpu", torch.float32).contiguous() for key, tensor in state.items()}
    path.touch()
    mode = path.stat().st_mode
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})  # transformers asks for that
    path.chmod(mode)  # safetensors makes a file of its own, for nobody else to read


def check_suffix(path: Path) -> None:
    """Raises UsageError for a file name that does not say in which of `SUFFIXES` to write."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--out {path}: name it {' or '.join(f'*{suffix}' for suffix in SUFFIXES)}")


@dataclass(frozen=True)
class Agreement:
    """How far upstream's answers are from ours.

    The largest difference of mask logits, the standard deviation of ours, and the largest difference of
    predicted IoUs, as a part of the largest of ours where that is above 1.
    """

    difference: float
    deviation: float
    scores: float

    @property
    def holds(self) -> bool:
        """Whether nothing but rounding lies between the two; not a number does not hold."""
        return self.difference <= TOLERANCE * self.deviation and self.scores <= TOLERANCE


@torch.no_grad()
def compare_with_upstream(sam: Sam, path: Path) -> Agreement:
    """Load the file in upstream's package and give its `SamPredictor` and `sam` one image and the same prompts.

    A point, a box, and both. The package is segment_anything, or segment_anything_hq where `sam` has that head.
    `sam` is at its model's own input size, normalises as SAM does, and may have its adapter still unmerged.
    Raises CheckpointError where the package cannot load the file, or is not there.
    """
    device = sam.mask_decoder.iou_token.weight.device
    image, prompts = draw_image(sam.size.input_size), make_prompts(sam.size.input_size)
    # TensorFloat-32 in convolutions would round more than the differences that are looked for.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ours = _ask(sam, image, prompts.to(device))
        theirs = _ask_upstream(load_upstream(sam.size, path, sam.hq is not None).to(device), image, prompts, sam.hq)
    (logits, their_logits), (scores, their_scores) = (
        [torch.cat([found.cpu().flatten() for found in answers[kind]]) for answers in (ours, theirs)] for kind in (0, 1)
    )
    return Agreement(
        (logits - their_logits).abs().max().item(),
        logits.std().item(),
        ((scores - their_scores).abs().max() / scores.abs().max().clamp(min=1)).item(),
    )


def load_upstream(size: ModelSize, path: Path, hq: bool = False) -> nn.Module:
    """Upstream's own `Sam` with the weights of the file, in evaluation mode, on the CPU.

    With `hq` that of segment_anything_hq. Sizes that the package does not know are put together of its encoder
    and decoder. Raises CheckpointError.
    """
    package = import_upstream(hq)
    try:
        known = package.sam_model_registry
        if size.name in known and path.suffix == ".pth" and not hq:
            return known[size.name](checkpoint=str(path)).eval()
        network = known[size.name]() if size.name in known else _build_upstream(package, size, hq)
        network.load_state_dict(read_tensors(path))  # strictly: the HQ package's own loading lets keys be missing
        return network.eval()
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {package.__name__} does not load it: {' '.join(str(error).split())}") from None


def import_upstream(hq: bool) -> ModuleType:
    """segment_anything, or segment_anything_hq. Raises CheckpointError where that one is not installed."""
    if not hq:
        return segment_anything
    try:
        with warnings.catch_warnings():
            # It takes layers from where timm had them once, and registers models under names that timm has too.
            warnings.simplefilter("ignore")
            import segment_anything_hq
    except ImportError as error:
        raise CheckpointError(
            f"--format sam-hq: segment_anything_hq, which proves the file, cannot be imported ({error}); "
            "pip install 'samcache[hq]'"
        ) from None
    return segment_anything_hq


def _build_upstream(package: ModuleType, size: ModelSize, hq: bool) -> nn.Module:
    modeling = package.modeling
    encoder, decoder = build_image_encoder(size, modeling.ImageEncoderViT), build_mask_decoder(size)
    if hq:
        decoder = modeling.MaskDecoderHQ(
            transformer_dim=size.neck_channels,
            transformer=decoder.transformer,
            iou_head_hidden_dim=size.decoder_score_width,
            vit_dim=size.width,
        )
    return modeling.Sam(encoder, build_prompt_encoder(size), decoder, pixel_mean=list(MEAN), pixel_std=list(STD))


def draw_image(side: int) -> UInt8[np.ndarray, "H W 3"]:
    """A smooth coloured image, the same on every machine up to rounding; its longest side is `side`, 4:3."""
    coarse = torch.rand(1, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (side * 3 // 4, side), mode="bicubic", antialias=True)
    return (smooth[0].permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()


def make_prompts(side: int) -> Prompts:
    """A point, a box, and both, on an image whose longest side is that of the input."""
    boxes = torch.tensor([[0, 0, 0, 0], [0.1, 0.15, 0.6, 0.5], [0.35, 0.3, 0.9, 0.7]]) * side
    return Prompts(
        image_index=torch.zeros(3, dtype=torch.long),
        kind=torch.zeros(3, dtype=torch.long),
        points_xy_input=torch.tensor([[0.4, 0.3], [0.55, 0.45]]) * side,
        labels=torch.ones(2, dtype=torch.long),
        offsets=torch.tensor([0, 1, 1, 2]),
        boxes_xyxy_input=boxes,
        has_box=torch.tensor([False, True, True]),
        has_mask=torch.zeros(3, dtype=torch.bool),
        chance=torch.zeros(3, 2),
    )


Answers = tuple[list[Float[Tensor, "M h w"]], list[Float[Tensor, "M"]]]


def _ask(sam: Sam, image: np.ndarray, prompts: Prompts) -> Answers:
    """Logits and predicted IoUs, one entry a prompt."""
    rows, columns, _ = image.shape
    square = torch.zeros(1, 3, columns, columns, dtype=torch.uint8)
    square[0, :, :rows] = torch.from_numpy(image).permute(2, 0, 1)
    levels = sam.prepare(sam.image_encoder(square.to(prompts.kind.device), torch.tensor([[rows, columns]])))
    alone = [prompts.select(torch.tensor([place], device=prompts.kind.device)) for place in range(len(prompts))]
    masks = [sam(levels, prompt, bool(prompt.ambiguous)) for prompt in alone]
    return [found.logits[0] for found in masks], [found.scores[0] for found in masks]


def _ask_upstream(network: nn.Module, image: np.ndarray, prompts: Prompts, hq: HqOutput | None) -> Answers:
    predictor = import_upstream(hq is not None).SamPredictor(network)
    predictor.set_image(image)
    mode = {} if hq is None else {"hq_token_only": hq == "hq"}
    logits, scores = [], []
    for place in range(len(prompts)):
        prompt = prompts.select(torch.tensor([place]))
        pointed, boxed = len(prompt.labels) > 0, bool(prompt.has_box)
        _, iou, low_resolution = predictor.predict(
            point_coords=prompt.points_xy_input.numpy() if pointed else None,
            point_labels=prompt.labels.numpy() if pointed else None,
            box=prompt.boxes_xyxy_input[0].numpy() if boxed else None,
            multimask_output=bool(prompt.ambiguous),
            return_logits=True,
            **mode,
        )
        logits.append(torch.from_numpy(low_resolution))
        scores.append(torch.from_numpy(iou))
    return logits, scores
