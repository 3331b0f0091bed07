"""Exponential moving average of a model's weights."""

import copy

import torch
from torch import nn

from utils.schedule import ema_decay


class EMA:
    """A deep copy of a model that follows it; use `.model` directly, it is always in evaluation mode.

    Trainable parameters are averaged, untrained ones and buffers copied.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int) -> None:
        """Move towards `model`; `num_updates` is how many updates came before this one."""
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        ours, theirs = self.model.state_dict(), model.state_dict()
        averaged = [name for name in ours if name in trained]
        copied = [name for name in ours if name not in trained]
        torch._foreach_lerp_(
            [ours[name] for name in averaged], [theirs[name] for name in averaged], 1.0 - ema_decay(num_updates)
        )
        # What never changes is worth no copy but the first.
        if num_updates == 0:
            for name in copied:
                ours[name].copy_(theirs[name])
