"""SAM as a whole, for training end to end: the image encoder before the top."""

from pathlib import Path

from torch import nn

from sam_cache.model.checkpoints import State, load_state
from sam_cache.model.encoder import Encoder, Normalise
from sam_cache.model.hq import HqOutput
from sam_cache.model.parts import part_of
from sam_cache.model.sizes import ModelSize, size_of
from sam_cache.model.top import Prepared, Top
from sam_cache.model.weights import fresh_head
from sam_cache.types import Batch


class Sam(Top):
    """A top that encodes a batch's pixels itself. The encoder's parameters lie under `image_encoder.vit`."""

    def __init__(self, size: ModelSize, state: State, normalise: Normalise = "sam", hq: HqOutput | None = None):
        super().__init__(size, {key: value for key, value in state.items() if not key.startswith("image_encoder.")}, hq)
        self.image_encoder = Encoder(size, part_of(state, "image_encoder"), normalise, self.levels)

    def encode(self, batch: Batch) -> Prepared:
        """What `forward` needs of the batch's pixels, with a graph where a layer of the encoder is trained."""
        return self.prepare(self.image_encoder(batch.pixels, batch.content_hw))


def load_sam(
    name: str,
    checkpoint: Path | None = None,
    input_size: int | None = None,
    normalise: Normalise = "sam",
    hq: HqOutput | None = None,
    seed: int = 0,
) -> Sam:
    """The whole of model `name`, in fp32 on the CPU; for arguments and errors see `load_encoder` and `load_top`.

    With `hq`, where the file has no head, a fresh one is drawn from `seed`.
    """
    size = size_of(name)
    state = load_state(size, checkpoint)
    return Sam(size.at(input_size), state if hq is None else fresh_head(size, seed) | state, normalise, hq)


def depth_of(name: str, network: nn.Module) -> int:
    """How many layers lie between a parameter and the masks, for learning rates that decay by layer.

    0 for the neck and all that comes after the encoder; then 1 for the last block, one more for each
    block before it, and one more again for the patch embedding and positions (Bao et al. 2021, BEiT;
    Kirillov et al. 2023, appendix A, decay by .8 per layer).
    """
    inside = name.removeprefix("image_encoder.vit.")
    if inside == name or inside.startswith("neck."):
        return 0
    blocks = len(network.image_encoder.vit.blocks)
    return blocks - int(inside.split(".")[1]) if inside.startswith("blocks.") else blocks + 1
