"""Forget some of what is known at every step, and draw it again: in the manner of ReMDM (arXiv 2503.00307, 4)."""

import torch
from torch import Tensor

from modeling.samplers.choose import ChooseThenSample
from modeling.samplers.sampler import State
from modeling.samplers.settings import SamplerSettings, masked_counts

LOOP_STARTS = 0.5  # share of the steps after which `loop` only redraws
LOOP_MASKED = 0.1  # share of the tokens that are masked meanwhile


class Remasking(ChooseThenSample):
    """Choose-then-sample in which a known token is masked again with a probability sigma, and more are drawn for it.

    With m masked after the step and k known before it, sigma is at most m / k. `settings.remasking` says how much of
    that is used: "cap" the least of it and eta, "rescale" eta times it, "loop" the same as "cap", but only while it
    goes round with a tenth of the tokens masked (all others are revealed before, in the first half of the steps). eta
    is `settings.remasking_strength`.

    As in MaskGIT and unlike in ReMDM numbers are not drawn, but rounded: every image has as many masked tokens.
    """

    def __init__(self, settings: SamplerSettings, num_tokens: int, codebook_size: int, num_known: int = 0):
        super().__init__(settings, num_tokens, codebook_size, num_known)
        self.loop_start = 0
        if settings.remasking == "loop":
            self.counts, self.loop_start = self._looping()

    def step(self, logits: Tensor, state: State) -> State:
        masked = state.positions.shape[1]
        number = self.num_forgotten(state.step, self.num_open - masked)
        forgotten = self._some_known(state, number)
        after = self.revealed(logits, state, masked - self.counts[state.step] + number)
        positions = torch.cat([after.positions, forgotten], dim=1).sort(dim=1).values
        return State(after.tokens.scatter(1, forgotten, self.mask_token), positions, after.step, after.noise)

    def num_forgotten(self, step: int, known: int) -> int:
        """How many of the tokens that are known before a step are masked after it."""
        if not known or not self.noise_scale(step) or step < self.loop_start:
            return 0
        most, eta = min(1.0, self.counts[step] / known), self.settings.remasking_strength
        sigma = eta * most if self.settings.remasking == "rescale" else min(eta, most)
        return round(sigma * known)

    def _some_known(self, state: State, number: int) -> Tensor:
        """Positions of `number` known tokens of each image that were not given at the start, at random."""
        if not number:
            return state.positions[:, :0]
        rank = self._ranks(state).scatter(1, state.positions, torch.inf)
        rank[:, : self.num_known] = torch.inf
        return rank.argsort(dim=1, stable=True)[:, :number]

    def _looping(self) -> tuple[list[int], int]:
        """Masked tokens after each step, and the step at which the loop begins."""
        steps = self.settings.num_sample_steps
        before = max(1, round(LOOP_STARTS * steps))
        kept = max(1, round(LOOP_MASKED * self.num_open))
        revealing = masked_counts(self.num_open, before, self.settings.mask_schedule)
        counts = [max(kept, count) for count in revealing] + [kept] * (steps - before)
        return [*counts[:-1], 0], before
