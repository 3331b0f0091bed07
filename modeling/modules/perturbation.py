"""Tokens as a generator might get them wrong, for a decoder that is to bear it (RobusTok, arXiv 2509.12474)."""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling.modules.masking import gumbel
from modeling.modules.quantizer import VectorQuantizer
from utils.errors import UserError


class Perturbation:
    """Replaces some tokens of some images in training; `training.perturb` in the configs, off where `images` is 0.

    The paper has 0.1 of the images and anneals the share of their tokens; here that share is constant.

    Args:
        images: Share of the images of a batch, 0..1: each is drawn by itself.
        tokens: Share of the tokens of those images, 0..1: each is drawn by itself.
        neighbours: A replacement is one of that many codes nearest to the token's, uniformly.
        fill: Instead, logits (B, N, V) of all tokens from tokens (B, N), where they are not hidden (B, N), and classes
            (B,): a generator's, which the replacements are drawn from.
    """

    def __init__(
        self,
        quantizer: VectorQuantizer,
        *,
        images: float,
        tokens: float,
        neighbours: int,
        fill: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ):
        for name, share in (("images", images), ("tokens", tokens)):
            if not 0 <= share <= 1:
                raise UserError(f"training.perturb.{name} is a share, 0 to 1, got {share}")
        if images and not 1 <= neighbours < quantizer.codebook_size:
            raise UserError(
                f"training.perturb.neighbours must be in 1..{quantizer.codebook_size - 1}, the other codes, "
                f"got {neighbours}"
            )
        if images and quantizer.choices is not None:
            raise UserError(
                "training.perturb.images puts any code into any place, and with model.vq_model.first_codes the first "
                "places have only some: set one of them to its default (0.0, null)"
            )
        self.quantizer, self.images, self.tokens, self.neighbours = quantizer, images, tokens, neighbours
        self.fill = fill

    def __bool__(self) -> bool:
        return self.images > 0 and not self.quantizer.bypass

    @torch.no_grad()
    def __call__(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """(B, N): the tokens (B, N) of images of these classes (B,), some of them replaced."""
        chosen = torch.rand(len(tokens), 1, device=tokens.device) < self.images
        replaced = chosen & (torch.rand(tokens.shape, device=tokens.device) < self.tokens)
        if self.fill is None:
            others = self._neighbours(tokens)
        else:
            logits = self.fill(tokens, replaced, classes).float()
            others = (logits + gumbel(torch.rand_like(logits))).argmax(dim=-1)
        return torch.where(replaced, others, tokens)

    def _neighbours(self, tokens: Tensor) -> Tensor:
        codes = self.quantizer.lookup(torch.arange(self.quantizer.codebook_size, device=tokens.device))
        distances = torch.cdist(codes, codes).fill_diagonal_(float("inf"))
        nearest = distances.topk(self.neighbours, largest=False).indices  # (V, neighbours)
        return nearest[tokens, torch.randint(self.neighbours, tokens.shape, device=tokens.device)]
