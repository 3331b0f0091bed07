"""What every sampler is: one object a call of `generate`, which takes logits step by step and leaves tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.modules.masking import ImageNoise
from modeling.samplers.settings import SamplerSettings


@dataclass(frozen=True)
class State:
    """Where sampling stands between two steps.

    Attributes:
        tokens: (B, N) int64, the mask token where nothing is known.
        positions: (B, M) int64, ascending: where the next step may set tokens, and is given logits.
        step: Steps that are done.
        noise: A stream for each image. Draw for all positions or for none of an image, so that what one position gets
            does not depend on which others are open.
    """

    tokens: Tensor
    positions: Tensor
    step: int
    noise: ImageNoise


class Sampler:
    """From logits to tokens in `settings.num_sample_steps` steps; a subclass says how in `step`.

    tests/test_samplers.py holds every registered sampler to this: an image follows from its own seed, label and
    settings alone, whatever batch it is in; a seed repeats it; a sampler without noise is deterministic; after the last
    step no token is the mask.

    Args:
        num_tokens: N, tokens of an image.
        codebook_size: V; tokens are in 0..V-1, and V is the mask.
    """

    def __init__(self, settings: SamplerSettings, num_tokens: int, codebook_size: int):
        self.settings, self.num_tokens, self.codebook_size = settings, num_tokens, codebook_size
        self.mask_token = codebook_size

    def start(self, num_images: int, noise: ImageNoise, device: torch.device) -> State:
        """Nothing known, everything open."""
        positions = torch.arange(self.num_tokens, device=device).expand(num_images, -1)
        return State(torch.full_like(positions, self.mask_token), positions, 0, noise)

    def step(self, logits: Tensor, state: State) -> State:
        """Set tokens from the guided logits (B, M, V), float32, at `state.positions`; nothing is changed in place."""
        raise NotImplementedError
