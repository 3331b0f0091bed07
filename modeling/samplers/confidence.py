"""The published sampler: predict everything that is masked, keep what is surest (MaskGIT, arXiv 2202.04200, 3.2)."""

from torch import Tensor

from modeling.modules.masking import gumbel, rows_at
from modeling.samplers.sampler import Sampler, State


class Confidence(Sampler):
    """Gumbel noise on the logits draws the tokens, and on their confidence chooses which of them to keep.

    A token that was kept never changes. The noise falls linearly to 0 at the last step.
    """

    def step(self, logits: Tensor, state: State) -> State:
        logits = self.sharpened(logits, state.step)
        noise_scale = self.noise_scale(state.step)
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
