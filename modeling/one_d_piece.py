"""One-D-Piece: TiTok whose every prefix of tokens is an image (arXiv 2501.10064)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from modeling.checkpoints.registry import TOKENIZER, register
from modeling.titok import TiTok
from utils.errors import UserError

# How many tokens an image keeps in a training step; the values of model.vq_model.tail_drop.
TAIL_DROPS = {
    "per_batch": "one uniform draw for the whole batch (published)",
    "per_sample": "one uniform draw for each image",
    "powers_of_two": "one draw for the whole batch from 1, 2, 4, ... and the full length",
    "half_full": "each image either all of its tokens or a uniform draw, with equal chance",
    "prefix_and_full": "both: each image is decoded twice, from a uniform draw and from all of its tokens",
    "prefix_to_full": "prefix_and_full, and the decoder's features of the prefix are pulled to those of the whole",
    "prefix_aligned": "prefix_and_full, and those after the decoder's first layer are pulled, by their cosine (NesTok)",
    "none": "all of them, as TiTok",
}
DECODED_TWICE = ("prefix_and_full", "prefix_to_full", "prefix_aligned")
# What those lengths are drawn from; the values of model.vq_model.length_draw.
LENGTH_DRAWS = {
    "uniform": "all lengths alike (published)",
    "by_gain": "half of the draws by how much each length gains, see LengthGains (after InfoTok)",
}


def draw_lengths(tail_drop: str, batch: int, limit: int, weights: Tensor | None = None) -> Tensor:
    """How many tokens each image keeps in a training step, (batch,) int64 in 1..limit (section 3.1).

    Drawn on the host from torch's global generator, so that a length never waits for the accelerator and the
    training seed repeats it.

    Args:
        tail_drop: One of `TAIL_DROPS`; those of `DECODED_TWICE` draw for the decoding from a prefix.
        weights: How often each length is drawn, (limit,) on the CPU; all alike when not given.
    """
    if tail_drop == "none":
        return torch.full((batch,), limit)
    if tail_drop == "powers_of_two":
        powers = powers_of_two(limit)
        chosen = torch.randint(len(powers), (1,)) if weights is None else torch.multinomial(weights[powers - 1], 1)
        return powers[chosen].expand(batch)
    num_draws = 1 if tail_drop == "per_batch" else batch
    if weights is None:
        lengths = torch.randint(1, limit + 1, (num_draws,))
    else:
        lengths = 1 + torch.multinomial(weights, num_draws, replacement=True)
    if tail_drop == "half_full":
        lengths[torch.rand(batch) < 0.5] = limit
    return lengths.expand(batch)


def powers_of_two(limit: int) -> Tensor:
    """1, 2, 4, ... below the limit, and the limit: one of each doubling."""
    return (2 ** torch.arange((limit - 1).bit_length() + 1)).clamp(max=limit)


def alignment_loss(early: Tensor, lengths: Tensor, num_cells: int) -> Tensor:
    """1 - cosine of a prefix's features and the whole's, which get no gradient (NesTok, hf.co/Jiawei804/NesTok).

    The features are those of all mask tokens and the mean of the latent tokens in use; each counts the same.

    Args:
        early: (2B, 1 + num_cells + N, W) of the prefixes, then of the whole, as `ViTDecoder` gives them.
        lengths: (2B,) latent tokens in use, 1..N.
    """
    cells, latents = early[:, 1 : 1 + num_cells].float(), early[:, 1 + num_cells :].float()
    lengths = lengths.to(early.device, non_blocking=True)[:, None]
    used = torch.arange(latents.shape[1], device=early.device) < lengths  # (2B, N)
    pooled = (latents * used[..., None]).sum(dim=1) / lengths
    prefix, full = torch.cat([pooled[:, None], cells], dim=1).chunk(2)
    return 1 - F.cosine_similarity(prefix, full.detach(), dim=-1).mean()


@register(TOKENIZER, "one_d_piece")
class OneDPiece(TiTok):
    """TiTok trained with tail token drop: the first tokens learn to carry the most, and any prefix decodes.

    In training mode `decode` drops the last tokens as `model.vq_model.tail_drop` says (see `TAIL_DROPS`), to lengths
    drawn as `model.vq_model.length_draw` says; a given length is then an upper bound. Where images are decoded twice,
    the results of a batch of B are 2B: of the prefixes, then of the whole. In evaluation mode nothing is random.

    Attributes:
        length_weights: How often "by_gain" draws each length, (N,) on the CPU, see `LengthGains`. Training sets it.
    """

    demands_full_length = False

    def __init__(self, config: dict | DictConfig):
        super().__init__(config)
        self.tail_drop = self.config.model.vq_model.get("tail_drop", "per_batch")
        self.length_draw = self.config.model.vq_model.get("length_draw", "uniform")
        self.length_weights: Tensor | None = None
        if self.tail_drop not in TAIL_DROPS:
            raise UserError(f"model.vq_model.tail_drop must be one of {', '.join(TAIL_DROPS)}, got {self.tail_drop}")
        if self.length_draw not in LENGTH_DRAWS:
            raise UserError(
                f"model.vq_model.length_draw must be one of {', '.join(LENGTH_DRAWS)}, got {self.length_draw}"
            )

    def forward(
        self,
        pixels: Tensor,
        length: int | Sequence[int] | Tensor | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode, then decode, as `TiTok` does: (`decode`'s result, `encode`'s dict).

        In training with tail_drop "prefix_to_full" or "prefix_aligned" the dict also has `prefix_loss`: how far the
        decoder's features of the prefixes are from those of the whole, which get no gradient from it. That is the mean
        squared distance after the last layer, or `alignment_loss` after the first. With length_draw "by_gain" it has
        `lengths`, how many tokens of each image (of its prefix, where it is decoded twice) there were, (B,) on the CPU.
        """
        if not self.training:
            return super().forward(pixels, length, change)
        z_quantized, result = self.encode(pixels)
        if change is not None:
            z_quantized = self._changed(z_quantized, change(result["min_encoding_indices"].flatten(1)))
        z_quantized, kept = self._drop_tail(z_quantized, length)
        early: list[Tensor] = []
        features = super()._features(z_quantized, kept, early)
        if self.tail_drop == "prefix_to_full":
            prefix, full = features.float().chunk(2)
            result["prefix_loss"] = F.mse_loss(prefix, full.detach())
        if self.length_draw == "by_gain":
            result["lengths"] = kept[: len(pixels)]
        if self.tail_drop == "prefix_aligned":
            result["prefix_loss"] = alignment_loss(early[0], kept, self.decoder.grid**2)
        return self._from_features(features), result

    def _features(
        self,
        z_quantized: Tensor,
        length: int | Sequence[int] | Tensor | None,
        early: list[Tensor] | None = None,
    ) -> Tensor:
        if self.training:
            z_quantized, length = self._drop_tail(z_quantized, length)
        return super()._features(z_quantized, length, early)

    def _drop_tail(self, z_quantized: Tensor, length: int | Sequence[int] | Tensor | None) -> tuple[Tensor, Tensor]:
        """What a training step decodes: tokens (kB, C, 1, N), and how many of each (kB,)."""
        most = self._lengths(length, len(z_quantized), z_quantized.shape[-1])
        kept = torch.minimum(most, self._drawn(len(z_quantized)))
        if self.tail_drop in DECODED_TWICE:
            return z_quantized.repeat(2, 1, 1, 1), torch.cat([kept, most])
        return z_quantized, kept

    def _drawn(self, batch: int) -> Tensor:
        return draw_lengths(self.tail_drop, batch, self.num_latent_tokens, self.length_weights)
