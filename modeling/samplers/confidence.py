"""The published sampler: predict everything that is masked, keep what is surest (MaskGIT, arXiv 2202.04200, 3.2)."""

from torch import Tensor

from modeling.modules.masking import gumbel, rows_at
from modeling.samplers.sampler import Sampler, State
from modeling.samplers.settings import SamplerSettings, masked_counts


class Confidence(Sampler):
    """Gumbel noise on the logits draws the tokens, and on their confidence chooses which of them to keep.

    A token that was kept never changes. The noise falls linearly to 0 at the last step.
    """

    def __init__(self, settings: SamplerSettings, num_tokens: int, codebook_size: int):
        super().__init__(settings, num_tokens, codebook_size)
        self.counts = masked_counts(num_tokens, settings.num_sample_steps)

    def step(self, logits: Tensor, state: State) -> State:
        remaining = 1 - (state.step + 1) / self.settings.num_sample_steps  # of the steps, after this one
        logits = logits / (0.5 + 0.8 * remaining if self.settings.softmax_temperature_annealing else 1.0)
        noise_scale = self.settings.randomize_temperature * remaining
        masked = state.positions

        noisy = logits
        if noise_scale:
            uniform = state.noise.uniform(self.num_tokens, self.codebook_size)
            noisy = logits + noise_scale * gumbel(rows_at(uniform, masked))
        sampled = noisy.argmax(dim=-1)  # (B, M)
        tokens = state.tokens.scatter(1, masked, sampled)

        confidence = logits.gather(2, sampled[..., None]).squeeze(2)  # (B, M)
        if noise_scale:
            confidence = confidence + noise_scale * gumbel(state.noise.uniform(self.num_tokens).gather(1, masked))
        least_sure = confidence.argsort(dim=1, stable=True)[:, : self.counts[state.step]]
        masked = masked.gather(1, least_sure).sort(dim=1).values
        return State(tokens.scatter(1, masked, self.mask_token), masked, state.step + 1, state.noise)
