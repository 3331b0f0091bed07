"""Masks and noise of MaskGIT (arXiv 2202.04200): what is hidden in training, what each sampled image draws."""

import hashlib
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UserError


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
    texts = (f"{seed}:{index}".encode("utf-8", "surrogateescape") for index in indices)  # a file's name has any bytes
    digests = (hashlib.sha256(text).digest() for text in texts)
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]


def draw_seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """`count` image seeds from a generator; two calls for one each give the same as one call for two."""
    device = generator.device if generator is not None else "cpu"
    # One by one: accelerators' generators give other numbers for one draw of two than for two draws of one.
    return [int(torch.randint(2**63 - 1, (), generator=generator, device=device)) for _ in range(count)]


def seeds_of(count: int, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None) -> Sequence[int]:
    """The seeds of `count` images, 0..2**64 - 1: those given, or drawn from the generator."""
    if seeds is None:
        if not isinstance(generator, torch.Generator | None):
            raise UserError(f"generator must be a torch.Generator, got {generator!r}; integers are given as seeds")
        return draw_seeds(count, generator)
    if generator is not None:
        raise UserError("generate takes either a generator or seeds, got both")
    try:
        seeds = [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise UserError(f"seeds must be integers, one an image, got {seeds!r}") from error
    if len(seeds) != count:
        raise UserError(f"seeds must be one an image, got {len(seeds)} for {count} labels")
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**64]:
        raise UserError(f"seeds must be in 0..2**64 - 1, got {wrong[0]}")
    return seeds


class ImageNoise:
    """Uniform noise with a stream of its own for each image, so that no image depends on who shares its batch."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self.device = device
        self.generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
        self.generators_of_doubles = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """(images, *shape) float32 in [0, 1), drawn on the device: each kind of device gives a seed other noise."""
        noise = torch.empty(len(self.generators), *shape, device=self.device)
        for own, generator in zip(noise, self.generators, strict=True):
            torch.rand(shape, generator=generator, out=own)
        return noise

    def uniform_doubles(self, *shape: int) -> Tensor:
        """(images, *shape) float64 in [0, 1), drawn and kept on the CPU: a seed gives the same on every device."""
        noise = torch.empty(len(self.generators_of_doubles), *shape, dtype=torch.float64)
        for own, generator in zip(noise, self.generators_of_doubles, strict=True):
            torch.rand(shape, generator=generator, dtype=torch.float64, out=own)
        return noise


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, always finite, from float32 uniform numbers in [0, 1)."""
    return -(-uniform.clamp(min=torch.finfo(torch.float32).tiny).log()).log()


def rows_at(values: Tensor, positions: Tensor) -> Tensor:
    """The rows of (B, N, V) at each image's positions (B, M): (B, M, V)."""
    images = torch.arange(len(values), device=values.device)[:, None]
    return values[images, positions]
