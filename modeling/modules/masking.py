"""Masks, guidance and noise of MaskGIT (arXiv 2202.04200): what is hidden in training, what is kept in sampling."""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UserError

GUIDANCE_DECAYS = ("constant", "linear", "power-cosine")


def masked_share(progress: float) -> float:
    """Share of the tokens that are masked at `progress` 0..1: acos(progress) * 2 / pi, from 1 down to 0."""
    return math.acos(progress) * 2 / math.pi


def masked_counts(num_tokens: int, num_steps: int) -> list[int]:
    """How many tokens are still masked after each sampling step, the last count being 0.

    The arccos schedule, rounded down, but every step fixes at least one token and leaves at least one for the next.
    With more steps than tokens, the last token is therefore drawn again until the last step.
    """
    counts = []
    masked = num_tokens
    for step in range(1, num_steps):
        scheduled = math.floor(num_tokens * masked_share(step / num_steps))
        masked = max(1, min(masked - 1, scheduled))
        counts.append(masked)
    return [*counts, 0]


def guidance_weight(decay: str, scale: float, power: float, step: int, num_steps: int) -> float:
    """Weight g of classifier-free guidance at a sampling step: logits = conditional + g (conditional - unconditional).

    Args:
        decay: "constant": g is `scale`. "linear": it rises from 0 as `scale` * step / num_steps. "power-cosine": it
            rises from 0 towards `scale` - 1, the slower the higher `power` is (in the form of the published code,
            unconditional + s (conditional - unconditional), s = 1 + g goes from 1 to `scale`).
        step: 0..num_steps - 1.

    Returns:
        0 where the unconditional logits are not needed.
    """
    if decay == "constant":
        return scale
    if decay == "linear":
        return scale * step / num_steps
    if decay == "power-cosine":
        return (scale - 1) * (1 - math.cos(math.pi * (step / num_steps) ** power)) / 2
    raise UserError(f"guidance_decay must be one of {', '.join(GUIDANCE_DECAYS)}, got {decay!r}")


def random_mask(codes: Tensor, mask_token: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Hide a random share of each image's tokens, for training (arXiv 2202.04200, section 3.1).

    The share is acos(u) * 2 / pi with u uniform, one draw an image; the positions are uniform.

    Args:
        codes: (B, N) int64.
        mask_token: What stands at the hidden positions.
        generator: Where the draws come from, on its own device; by default torch's own of the codes' device.

    Returns:
        The codes with hidden ones replaced, (B, N), and the mask, (B, N) bool, True where hidden (1..N an image).
    """
    batch, num_tokens = codes.shape
    device = generator.device if generator is not None else codes.device
    share = torch.rand(batch, 1, generator=generator, device=device).acos() * (2 / math.pi)
    count = (share * num_tokens).round().clamp(min=1)
    order = torch.rand(batch, num_tokens, generator=generator, device=device).argsort(dim=1)  # a permutation a row
    mask = (order < count).to(codes.device)
    return codes.masked_fill(mask, mask_token), mask


def random_drop(batch: int, probability: float, device: torch.device) -> Tensor:
    """Which images of a batch lose their class, (batch,) bool on `device`, from torch's own generator there."""
    return torch.rand(batch, device=device) < probability


def image_seeds(seed: int, indices: Sequence[int | str]) -> list[int]:
    """The seed of each image of a run, from the run's seed and the image's index (or name) alone.

    Hashed, so that the images of seed 1 are not those of seed 0 shifted by one.
    """
    digests = (hashlib.sha256(f"{seed}:{index}".encode()).digest() for index in indices)
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def draw_seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """`count` image seeds from a generator; two calls for one each give the same as one call for two."""
    device = generator.device if generator is not None else "cpu"
    # One by one: accelerators' generators give other numbers for one draw of two than for two draws of one.
    return [int(torch.randint(2**63 - 1, (), generator=generator, device=device)) for _ in range(count)]


class ImageNoise:
    """Uniform noise with a stream of its own for each image, so that no image depends on who shares its batch.

    Drawn on `device`: the same seed gives other noise on another kind of device, the same on the same kind.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """(images, *shape) float32 in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in self.generators])


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, always finite, from float32 uniform numbers in [0, 1)."""
    return -(-uniform.clamp(min=torch.finfo(torch.float32).tiny).log()).log()
