"""Vector quantizer: continuous vectors in, nearest codebook entries out."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a straight-through gradient (VQ-VAE, arXiv 1711.00937, section 3).

    Always computes in float32, whatever autocast says: near ties would otherwise change codes.

    Args:
        codebook_size: V, number of codes.
        token_size: C, channels of a code.
        commitment_cost: Weight of the commitment term in `quantizer_loss`.
        use_l2_norm: Put vectors and codes on the unit sphere first (ViT-VQGAN, arXiv 2110.04627, section 3.2).
        choices: How many of the first codes each position along W may choose among, see `growing_choices`; all when not
            given.

    Attributes:
        bypass: While True, (normalised) vectors pass through unquantised in training mode. Training sets it for a
            while, so that the encoder is useful before codes are placed where its outputs are.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        token_size: int,
        commitment_cost: float = 0.25,
        use_l2_norm: bool = True,
        choices: Sequence[int] | None = None,
    ):
        super().__init__()
        self.codebook_size = codebook_size
        self.commitment_cost = commitment_cost
        self.use_l2_norm = use_l2_norm
        self.bypass = False
        self.choices = choices
        self._barred: dict[torch.device, Tensor] = {}
        self.embedding = nn.Embedding(codebook_size, token_size)
        self.embedding.weight.data.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantise (B, C, H, W).

        Returns:
            z_quantized (B, C, H, W) float32, and a dict: `min_encoding_indices` (B, H, W) int64, `quantizer_loss` =
            `commitment_loss` (weighted by commitment_cost) + `codebook_loss`, scalars.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = self.normalize(z.float().movedim(1, -1))  # (B, H, W, C)
            indices = self.nearest(z)
            z_quantized = self.lookup(indices)
            commitment_loss = self.commitment_cost * F.mse_loss(z_quantized.detach(), z)
            codebook_loss = F.mse_loss(z_quantized, z.detach())
            z_quantized = z if self.bypass and self.training else z + (z_quantized - z).detach()
        return z_quantized.movedim(-1, 1), {
            "quantizer_loss": commitment_loss + codebook_loss,
            "commitment_loss": commitment_loss,
            "codebook_loss": codebook_loss,
            "min_encoding_indices": indices,
        }

    def normalize(self, vectors: Tensor) -> Tensor:
        """(..., C) on the unit sphere, or as they are without `use_l2_norm`."""
        return F.normalize(vectors, dim=-1) if self.use_l2_norm else vectors

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Codes (...) of the nearest entries of normalised vectors (..., C), by squared distance.

        With `choices` the vectors are (..., W, C), and each position has its own entries to choose among.
        """
        codebook = self.normalize(self.embedding.weight.float())
        flat = z.reshape(-1, z.shape[-1])
        # |z|^2 is the same for every code and left out.
        distance = torch.addmm(codebook.square().sum(dim=1), flat, codebook.T, alpha=-2)
        if self.choices is not None:
            distance = distance.view(*z.shape[:-1], -1).masked_fill(self.barred(z.device), float("inf"))
        return distance.argmin(dim=-1).view(z.shape[:-1])

    def barred(self, device: torch.device) -> Tensor:
        """(W, V), which codes each position may not have; made once a device, as a GPU is waited for meanwhile."""
        if device not in self._barred:
            choices = torch.tensor(self.choices, device=device)
            self._barred[device] = torch.arange(self.codebook_size, device=device) >= choices[:, None]
        return self._barred[device]

    def lookup(self, indices: Tensor) -> Tensor:
        """(normalised) codebook entries (..., C) of codes (...)."""
        return self.normalize(self.embedding(indices).float())


def growing_choices(first: int, num_positions: int, codebook_size: int) -> list[int]:
    """How many codes each position may choose among: `first` at the first, all at the last, by a constant factor each.

    Equal steps of bits from token to token. Variable codebook size quantization (VCQ, arXiv 2605.06207) grows from 2
    over one shared codebook, each position taking the nearest of the first entries; the constant factor is ours.
    """
    factor = (codebook_size / first) ** (1 / max(1, num_positions - 1))
    return [*(round(first * factor**position) for position in range(num_positions - 1)), codebook_size]
