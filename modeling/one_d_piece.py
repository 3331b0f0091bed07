"""One-D-Piece: TiTok whose every prefix of tokens is an image (arXiv 2501.10064)."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from torch import Tensor

from modeling.titok import TiTok
from utils.cli import UserError

TAIL_DROPS = ("per_batch", "per_sample", "half_full")


def draw_lengths(tail_drop: str, batch: int, limit: int) -> Tensor:
    """How many tokens each image keeps in a training step, (batch,) int64 in 1..limit (section 3.1).

    Drawn on the host from torch's global generator, so that a length never waits for the accelerator and the
    training seed repeats it.

    Args:
        tail_drop: "per_batch", one uniform draw for all images (published); "per_sample", one uniform draw an image;
            "half_full", per image either all tokens or a uniform draw, with equal chance.
    """
    if tail_drop == "per_batch":
        return torch.randint(1, limit + 1, (1,)).expand(batch)
    lengths = torch.randint(1, limit + 1, (batch,))
    if tail_drop == "half_full":
        lengths[torch.rand(batch) < 0.5] = limit
    return lengths


class OneDPiece(TiTok):
    """TiTok trained with tail token drop: the first tokens learn to carry the most, and any prefix decodes.

    In training mode `decode` drops the last tokens as `model.vq_model.tail_drop` says (see `draw_lengths`); a given
    length is then an upper bound. In evaluation mode nothing is random.
    """

    demands_full_length = False

    def __init__(self, config: dict | DictConfig):
        super().__init__(config)
        self.tail_drop = self.config.model.vq_model.get("tail_drop", "per_batch")
        if self.tail_drop not in TAIL_DROPS:
            raise UserError(f"model.vq_model.tail_drop must be one of {', '.join(TAIL_DROPS)}, got {self.tail_drop}")

    def _lengths(self, length: int | Sequence[int] | Tensor | None, batch: int, available: int) -> Tensor:
        lengths = super()._lengths(length, batch, available)
        if self.training:
            lengths = torch.minimum(lengths, draw_lengths(self.tail_drop, batch, self.num_latent_tokens))
        return lengths
