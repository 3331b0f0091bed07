"""An image from a class and a seed: decoded at every length, and after each step of sampling."""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from codec.rate import decoded, tried_lengths
from modeling.modules.masking import image_seeds
from modeling.samplers.settings import SamplerSettings
from playground.models import Painter
from utils.errors import UserError
from utils.images import to_array

MAX_STEPS = 64  # of sampling
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Generated:
    """An image that was sampled.

    Args:
        about: Class and seed, for people.
        steps: (S + 1, N), tokens before the first and after each step, V where nothing is known yet.
        guesses: (S + 1, P, P, 3) uint8: what is known, and for the rest what the generator holds likeliest.
        lengths, frames: (L,) and (L, P, P, 3) uint8, of the first tokens alone.
    """

    about: str
    codebook_size: int
    steps: np.ndarray
    guesses: np.ndarray
    lengths: np.ndarray
    frames: np.ndarray

    def place(self, num_tokens: int) -> int:
        """As `Prepared.place`."""
        return max(0, int(np.searchsorted(self.lengths, num_tokens, side="right")) - 1)


@torch.inference_mode()
def generate(painter: Painter, label: int, seed: int, settings: SamplerSettings) -> Generated:
    """Sample one image, the same as `scripts/inference_generator.py --seed` gives as the class's first.

    Raises:
        UserError: The seed or the steps are out of range.
    """
    if not 0 <= seed <= MAX_SEED or seed != int(seed):
        raise UserError(f"a seed is a whole number of 0 to {MAX_SEED}, got {seed:g}")
    if settings.num_sample_steps > MAX_STEPS:
        raise UserError(f"this page samples in 1 to {MAX_STEPS} steps, got {settings.num_sample_steps}")
    generator, tokenizer = painter.generator, painter.tokenizer
    seeds = image_seeds(int(seed), [f"{label}/0"])
    tokens, after = generator.generate([label], seeds=seeds, return_intermediate=True, **asdict(settings))
    masked = torch.full_like(tokens, generator.mask_token)
    steps = torch.cat([masked, after[:, 0]])  # (S + 1, N)
    lengths = tried_lengths(tokenizer, tokens.shape[1])  # a draft has fewer
    frames = torch.cat([images.permute(0, 2, 3, 1) for images in decoded(tokenizer, tokens, lengths)])
    return Generated(
        about=f"{painter.classes[label]}, seed {int(seed)}",
        codebook_size=generator.codebook_size,
        steps=steps.cpu().numpy(),
        guesses=to_array(tokenizer.decode_tokens(guessed(painter, steps, label))),
        lengths=np.array(lengths),
        frames=frames.cpu().numpy(),
    )


def guessed(painter: Painter, tokens: Tensor, label: int) -> Tensor:
    """Tokens (S, N) with the likeliest codes where they are masked, each in the light of all that are known."""
    generator = painter.generator
    labels = torch.full((len(tokens),), label, device=tokens.device)
    drops_none = torch.zeros_like(labels, dtype=torch.bool)
    likeliest = generator(tokens, labels, drops_none, num_tokens=tokens.shape[1]).argmax(dim=-1)
    return torch.where(tokens == generator.mask_token, likeliest, tokens)
