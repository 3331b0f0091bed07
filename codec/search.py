"""Better tokens for the same decoder: searched so that what is decoded from them comes nearer to the image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from codec.rate import Encoded, squared_error
from modeling.titok import TiTok
from utils.errors import UserError
from utils.evaluation.metrics import to_uint8

BATCH, SLOPE_BATCH = 256, 16  # decoded at once, without and with a gradient
TRADE = 0.01  # dB that a bit is worth: somewhat less than what more tokens gain for the bits that they cost
ALPHA, BETA = 0.01, 0.25  # squared distances that a bit and a dB are worth where candidates are ranked
MANY = 8  # candidates, for whose ranking a gradient pays
Bits = Callable[[Tensor], Tensor]  # of tokens (B, p): bits (B, V) of each token that may come next


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Args:
        sweeps: Over all positions, one after the other: codes tried at positions 0, 1, 2-3, 4-7, 8-15, ...; the last
            number holds for all later ones.
        survivors: How many of them are decoded at more than one length.
    """

    sweeps: tuple[tuple[int, ...], ...]
    survivors: int

    def steps(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """(position, codes tried), in turn."""
        for candidates in self.sweeps:
            for place in range(num_tokens):
                if tried := candidates[min(place.bit_length(), len(candidates) - 1)]:
                    yield place, tried


EFFORTS = (
    Effort((), 0),
    Effort(((2, 2, 2, 2, 1),), 1),
    Effort(((8, 8, 8, 8, 3, 2),), 1),
    Effort(((16, 16, 16, 16, 5, 2), (6, 6, 6, 6, 0)), 2),
)


def effort_of(level: int) -> Effort:
    if level not in range(len(EFFORTS)):
        raise UserError(f"an effort is 0 to {len(EFFORTS) - 1}, got {level}")
    return EFFORTS[level]


def searched_lengths(most: int) -> list[int]:
    """1, 2, 4, ... and `most`: the prefixes that a search improves together, so that a cut file is no worse for it."""
    return [2**power for power in range(most.bit_length()) if 2**power < most] + [most]


@torch.no_grad()
def search(
    tokenizer: TiTok,
    encoded: Encoded,
    lengths: Sequence[int],
    effort: Effort,
    weights: Tensor | None = None,
    bits: Bits | None = None,
) -> Tensor:
    """Tokens (B, N), those of `encoded` changed one after the other where the decoded prefixes gain by it.

    At each position codes are tried that are near to the encoder's vector, are cheap and, where many are tried, lie
    where the error falls. What is minimised is the mean over `lengths` of the error in dB and of `TRADE` times the
    bits. In the bits a token's own count, and not what it makes of those after it: they are chosen later, and know it.

    Args:
        lengths: Rising; from the last one on tokens stay as they are.
        weights: Of pixels, as of `squared_error`, (B, 1, P, P).
        bits: What tokens cost; where not given all cost the same.
    """
    tokens, places = encoded.tokens.clone(), torch.arange(len(encoded), device=encoded.tokens.device)
    trial = Trial(tokenizer, encoded.pixels, weights)
    errors = trial.errors(tokens[:, None], lengths)[:, 0]  # (B, G)
    unit = tokenizer.quantize.normalize(encoded.vectors.float())
    codebook = tokenizer.quantize.lookup(torch.arange(tokenizer.codebook_size, device=tokens.device))
    for place, num_candidates in effort.steps(lengths[-1]):
        num_candidates = min(num_candidates, tokenizer.codebook_size - 1)  # there are no more others
        first = next(index for index, length in enumerate(lengths) if length > place)
        current = tokens[:, place : place + 1]
        distances = torch.cdist(unit[:, place], codebook).square()
        costs = bits(tokens[:, :place]) if bits else torch.zeros_like(distances)
        if num_candidates >= MANY:
            slopes = trial.slopes(codebook[tokens[:, : lengths[first]]], place, unit[:, place])
            distances += BETA * slopes @ codebook.T
        likely = (distances + ALPHA * costs).scatter(1, current, torch.inf)
        candidates = likely.topk(num_candidates, dim=1, largest=False).indices  # (B, K)
        costs = TRADE * (costs - costs.gather(1, current))  # (B, V), beside the current token
        # Most candidates are decoded at the nearest length alone, the best of them at all.
        trials = with_token(tokens, place, candidates)
        near = trial.errors(trials, lengths[first : first + 1])[..., 0]
        best = (near + costs.gather(1, candidates)).topk(min(effort.survivors, num_candidates), largest=False).indices
        candidates, trials = candidates.gather(1, best), trials[places[:, None], best]
        tried = torch.cat([near.gather(1, best)[..., None], trial.errors(trials, lengths[first + 1 :])], dim=2)
        gains = (errors[:, None, first:] - tried).mean(dim=2) - costs.gather(1, candidates)  # (B, S)
        gain, best = gains.max(dim=1)
        better = gain > 0
        tokens[better, place] = candidates[places, best][better]
        errors[better, first:] = tried[places, best][better]
    return tokens


def with_token(tokens: Tensor, place: int, candidates: Tensor) -> Tensor:
    """(B, K, N): tokens (B, N) with each of the candidates (B, K) in one place."""
    trials = tokens[:, None].repeat(1, candidates.shape[1], 1)
    trials[:, :, place] = candidates
    return trials


class Trial:
    """How far decoded prefixes are from images (B, 3, P, P) uint8."""

    def __init__(self, tokenizer: TiTok, pixels: Tensor, weights: Tensor | None):
        self.tokenizer, self.pixels, self.weights = tokenizer, pixels, weights

    def errors(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """(B, K, L) in dB, lower is better, of the prefixes of tokens (B, K, N)."""
        num_images, num_trials = tokens.shape[:2]
        rows = torch.arange(num_images, device=tokens.device).repeat_interleave(num_trials)
        flat = tokens.flatten(0, 1)
        parts = []
        for length in lengths:
            errors = [self._decoded(flat[part, :length], rows[part]) for part in _parts(len(flat))]
            parts.append(torch.cat(errors).view(num_images, num_trials))
        return torch.stack(parts, dim=2) if parts else tokens.new_empty((num_images, num_trials, 0)).float()

    def slopes(self, codes: Tensor, place: int, vectors: Tensor) -> Tensor:
        """(B, C), how errors in dB of codes (B, n, C) change with the one at a place, where it is `vectors` (B, C)."""
        codes = codes.clone()
        codes[:, place] = vectors
        parts = [slice(first, first + SLOPE_BATCH) for first in range(0, len(codes), SLOPE_BATCH)]
        return torch.cat([self._gradient(codes[part], part) for part in parts])[:, place]

    def _gradient(self, codes: Tensor, part: slice) -> Tensor:
        """(b, n, C), of the errors in dB of codes (b, n, C)."""
        with torch.enable_grad(), torch.autocast(codes.device.type, enabled=False):
            codes.requires_grad_()
            images = self.tokenizer.decode(codes.movedim(-1, 1)[:, :, None])
            errors = (images - self.pixels[part].float() / 255).square()
            if self.weights is not None:
                errors = errors * self.weights[part]
            decibels = 10 * torch.log10(errors.sum(dim=(1, 2, 3)).clamp(min=1e-10))  # but for a constant
            return torch.autograd.grad(decibels.sum(), codes)[0]

    def _decoded(self, tokens: Tensor, rows: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            images = to_uint8(self.tokenizer.decode_tokens(tokens))
        weights = None if self.weights is None else self.weights[rows]
        errors = squared_error(images, self.pixels[rows], weights)
        return 10 * torch.log10(errors.clamp(min=1e-10)).float().to(images.device)


def _parts(count: int) -> list[slice]:
    return [slice(first, first + BATCH) for first in range(0, count, BATCH)]
