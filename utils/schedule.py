"""Learning rate and EMA decay as pure functions of the step, and which parameters are decayed."""

import math
from collections.abc import Iterable

from torch import nn

NO_DECAY_NAMES = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma")


def learning_rate(step: int, *, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to `peak`, cosine to `end` at `total_steps`, `end` for good afterwards.

    Args:
        step: Index of the update, 0 for the first, which therefore has rate 0 where there is a warm-up.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - end)


def ema_decay(num_updates: int) -> float:
    """Decay of the EMA update that follows `num_updates` others: 0 (a copy), then 2/11, 3/12, ... up to 0.999."""
    return min(0.999, (1 + num_updates) / (10 + num_updates)) if num_updates else 0.0


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Trainable parameters in two optimiser groups: decayed, and not.

    Tensors of fewer than two dimensions and those with a name of `NO_DECAY_NAMES` are not decayed.
    """
    groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim < 2 or any(word in name for word in NO_DECAY_NAMES)
                groups[plain]["params"].append(parameter)
    return [group for group in groups if group["params"]]
