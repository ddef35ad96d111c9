"""What every adapter of the image encoder is: a module that is called around the blocks."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class Adapter(nn.Module):
    """Small trainable layers beside a frozen encoder; this one changes nothing.

    `Encoder.forward` calls `prepare` once per batch and hands its result, the adapter's own, to the
    other hooks. Tokens are (I, g, g, C): g x g patches of width C for each of I images.
    """

    def prepare(
        self,
        inputs: Float[Tensor, "I 3 S S"],
        patches: Float[Tensor, "I g g C"],
        tokens: Float[Tensor, "I g g C"],
    ) -> Any:
        """From the normalised pixels, the embedded patches, and these with their positions added."""

    def before_block(self, number: int, tokens: Float[Tensor, "I g g C"], prior: Any) -> Float[Tensor, "I g g C"]:
        """The tokens that block `number`, counted from 0, is to see."""
        return tokens

    def added_qkv(self, number: int, normed: Float[Tensor, "I g g C"], prior: Any) -> Float[Tensor, "I g g 3*C"] | None:
        """What to add to the q, k and v of block `number`, whose attention is given `normed`; None for nothing."""
        return None

    def after_block(self, number: int, tokens: Float[Tensor, "I g g C"], prior: Any) -> Float[Tensor, "I g g C"]:
        """The tokens to go on with after block `number`."""
        return tokens
