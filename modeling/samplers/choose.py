"""Choose positions first, then draw their tokens: at random, front to back, or by moments (arXiv 2510.04525)."""

import torch
from torch import Tensor

from modeling.modules.masking import gumbel, rows_at
from modeling.samplers.sampler import Sampler, State
from utils.evaluation.statistics import doubled


class ChooseThenSample(Sampler):
    """`settings.order` chooses positions without looking at tokens, and each token is drawn from its softmax.

    The published sampler draws with Gumbel noise of scale T twice, for tokens and for positions. Both together amount
    to a softmax of temperature T / 2 at positions chosen by a moment of the prediction (section 3 of the paper). So
    half the noise is the softmax temperature here: T = 2, constant, is plain sampling.
    """

    def step(self, logits: Tensor, state: State) -> State:
        return self.revealed(logits, state, state.positions.shape[1] - self.counts[state.step])

    def revealed(self, logits: Tensor, state: State, number: int) -> State:
        """The state after a step that sets `number` tokens of each image."""
        noise_scale = self.noise_scale(state.step)
        order = self._scores(logits, state, noise_scale).argsort(dim=1, descending=True, stable=True)  # (B, M)
        chosen = order[:, :number]
        positions = state.positions.gather(1, chosen)

        rows = self.sharpened(rows_at(logits, chosen), state.step)  # (B, number, V)
        if noise_scale:
            uniform = state.noise.uniform_doubles(self.num_tokens).gather(1, positions.cpu())
            sampled = drawn(rows / (noise_scale / 2), uniform)
        else:
            sampled = rows.argmax(dim=-1)
        masked = state.positions.gather(1, order[:, number:]).sort(dim=1).values
        return State(state.tokens.scatter(1, positions, sampled), masked, state.step + 1, state.noise)

    def _scores(self, logits: Tensor, state: State, noise_scale: float) -> Tensor:
        """(B, M), the higher the earlier. Without noise a random order would not be one: it is front to back then."""
        order = self.settings.order
        if order == "moment":
            scores = moments(self.sharpened(logits, state.step), noise_scale)
            if noise_scale:
                scores = scores + noise_scale * gumbel(self._ranks(state).gather(1, state.positions))
            return scores
        if order == "random" and noise_scale:
            return self._ranks(state).gather(1, state.positions)
        return -state.positions

    def _ranks(self, state: State) -> Tensor:
        """Uniform noise by which positions are put in order, (B, N) float32."""
        return state.noise.uniform_doubles(self.num_tokens).float().to(state.positions.device)


def moments(logits: Tensor, noise_scale: float) -> Tensor:
    """How likely the published sampler is to keep a position, whatever its token: (B, M), on the scale of logits.

    Its token x has probability p(x)^(1/T), normalised, and is kept with weight p(x)^(1/T): T times the logarithm of
    the sum of both over all x. For T = 0 that is the highest log-probability.
    """
    logits = logits.log_softmax(dim=-1)
    if not noise_scale:
        return logits.amax(dim=-1)
    scaled = logits / noise_scale
    return noise_scale * ((2 * scaled).logsumexp(dim=-1) - scaled.logsumexp(dim=-1))


def drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """One code of each softmax of (B, M, V), by a uniform number in [0, 1) for each, (B, M) float64 on the CPU.

    A number a token, where Gumbel noise takes V of them, and in float64: in float32 the rarest codes never come.
    """
    cumulative = doubled(logits.softmax(dim=-1)).cumsum(dim=-1)
    threshold = uniform[..., None].to(cumulative.device) * cumulative[..., -1:]
    code = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return code.clamp(max=logits.shape[-1] - 1).to(logits.device)
