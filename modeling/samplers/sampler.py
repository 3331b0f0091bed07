"""What every sampler is: one object a call of `generate`, which takes logits step by step and leaves tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.modules.masking import ImageNoise
from modeling.samplers.settings import SamplerSettings, masked_counts


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
    step no token is the mask; tokens that were known at the start stay.

    Args:
        num_tokens: N, tokens of an image.
        codebook_size: V; tokens are in 0..V-1, and V is the mask.
        num_known: How many of an image's first tokens are given.
    """

    def __init__(self, settings: SamplerSettings, num_tokens: int, codebook_size: int, num_known: int = 0):
        self.settings, self.num_tokens, self.codebook_size = settings, num_tokens, codebook_size
        self.num_known, self.num_open = num_known, num_tokens - num_known
        self.mask_token = codebook_size
        self.counts = masked_counts(self.num_open, settings.num_sample_steps, settings.mask_schedule)

    def start(self, known: Tensor, noise: ImageNoise) -> State:
        """Only the first tokens known, (B, num_known) int64, everything else open."""
        positions = torch.arange(self.num_known, self.num_tokens, device=known.device).expand(len(known), -1)
        tokens = torch.cat([known, torch.full_like(positions, self.mask_token)], dim=1)
        return State(tokens, positions, 0, noise)

    def step(self, logits: Tensor, state: State) -> State:
        """Set tokens from the guided logits (B, M, V), float32, at `state.positions`; nothing is changed in place."""
        raise NotImplementedError

    def remaining(self, step: int) -> float:
        """Share of the steps that come after this one."""
        return 1 - (step + 1) / self.settings.num_sample_steps

    def noise_scale(self, step: int) -> float:
        """Scale of the Gumbel noise at a step; 0 is none."""
        decays = self.settings.temperature_decay == "linear"
        return self.settings.randomize_temperature * (self.remaining(step) if decays else 1.0)

    def sharpened(self, logits: Tensor, step: int) -> Tensor:
        """Logits over the temperature of the prediction, and without what is outside its nucleus."""
        annealing = self.settings.softmax_temperature_annealing
        logits = logits / (0.5 + 0.8 * self.remaining(step) if annealing else 1.0)
        return nucleus(logits, self.settings.top_p) if self.settings.top_p < 1 else logits


def nucleus(logits: Tensor, share: float) -> Tensor:
    """Logits, -inf outside the fewest likeliest codes that hold `share` of the probability (arXiv 1904.09751, 3.1)."""
    ordered, codes = logits.sort(dim=-1, descending=True, stable=True)
    shares = ordered.softmax(dim=-1)
    outside = shares.cumsum(dim=-1) - shares >= share  # what is before a code holds enough
    return logits.masked_fill(outside.scatter(-1, codes, outside), -torch.inf)
