"""Lengths drawn by how much they gain, from a running estimate of the loss at each."""

import torch
from torch import Tensor

DECAY = 0.99  # of the sums, a step
REFRESH_EVERY = 50  # steps, so that a draw seldom waits for an accelerator
UNIFORM = 0.5  # share of the draws that stay uniform


class LengthGains:
    """How often each length is to be drawn: half uniformly, half by the fall of the loss that its last token brings.

    InfoTok (arXiv 2512.16975) shows that lengths drawn blind to the data are suboptimal, and gives each video a length
    by its information. This is a simpler rule in that spirit: a length counts by the loss that it wins over the one
    before, averaged over images. Losses are kept by doublings of the length (1, 2, 3..4, 5..8, ...), because single
    lengths are seen too seldom. The first length has none before it and counts as the second.

    Args:
        drawn: (N,) bool, the lengths that can be drawn; all of them when not given.

    Attributes:
        state: What a resumed run needs: `length_losses` and `length_counts`, decaying sums for each doubling, and
            `length_weights` (N,), in use.
    """

    def __init__(self, num_latent_tokens: int, drawn: Tensor | None = None):
        lengths = torch.arange(1, num_latent_tokens + 1)
        self.drawn = torch.ones(num_latent_tokens) if drawn is None else drawn.float()
        self.doubling = torch.tensor([(int(length) - 1).bit_length() for length in lengths])  # (N,)
        number = int(self.doubling[-1]) + 1
        self.state = {
            "length_losses": torch.zeros(number),
            "length_counts": torch.zeros(number),
            "length_weights": self.drawn / self.drawn.sum(),
        }
        self._weights: Tensor | None = None  # on the CPU, as long as they are those of the state

    def weights(self, step: int) -> Tensor:
        """(N,) on the CPU: the probability of each length at `step`."""
        if step % REFRESH_EVERY == 0 and bool(self.state["length_counts"].all()):
            self.state["length_weights"].copy_(self._fresh())
            self._weights = None
        if self._weights is None:
            self._weights = self.state["length_weights"].cpu()
        return self._weights

    def _fresh(self) -> Tensor:
        losses = (self.state["length_losses"] / self.state["length_counts"]).cpu()
        if len(losses) == 1:
            return torch.ones(1)
        gains = (losses[:-1] - losses[1:]).clamp(min=0)
        gains = torch.cat([gains[:1], gains])
        by_length = self.drawn * (gains / self.doubling.bincount(self.drawn))[self.doubling]
        total = by_length.sum()
        uniform = self.drawn / self.drawn.sum()
        return UNIFORM * uniform + (1 - UNIFORM) * by_length / total if total > 0 else uniform

    @torch.no_grad()
    def watch(self, lengths: Tensor, losses: Tensor) -> None:
        """Take in the losses (B,) of images decoded from so many tokens (B,)."""
        sums, counts = self.state["length_losses"], self.state["length_counts"]
        where = self.doubling[lengths.cpu() - 1].to(losses.device, non_blocking=True)  # a step waits for no accelerator
        sums.mul_(DECAY).index_add_(0, where, losses.float())
        counts.mul_(DECAY).index_add_(0, where, torch.ones_like(losses, dtype=torch.float32))
