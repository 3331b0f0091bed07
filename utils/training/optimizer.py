"""How weights move: which are decayed, the learning rate of each step, and their moving average."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from utils.errors import UserError

NO_DECAY_NAMES = ("ln", "bias", "latent_tokens", "mask_token", "embedding", "norm", "gamma")


def make_optimizer(player: str, module: nn.Module, config: DictConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of a task's player."""
    if config.optimizer.name != "adamw":
        raise UserError(f"optimizer.name must be adamw, got {config.optimizer.name}")
    if config.lr_scheduler.scheduler != "cosine":
        raise UserError(f"lr_scheduler.scheduler must be cosine, got {config.lr_scheduler.scheduler}")
    params = config.optimizer.params
    device = next(module.parameters()).device
    return torch.optim.AdamW(
        parameter_groups([module], params.weight_decay),
        lr=peak_rate(player, config),
        betas=(params.beta1, params.beta2),
        fused=device.type in ("cuda", "cpu"),
    )


def take_settings(optimizer: torch.optim.Optimizer, module: nn.Module, config: DictConfig) -> None:
    """Give an optimiser, whose state brought the settings of its checkpoint, those of the configuration.

    The learning rate is set in every step.
    """
    params = config.optimizer.params
    groups = parameter_groups([module], params.weight_decay)
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group |= {"weight_decay": own["weight_decay"], "betas": (params.beta1, params.beta2)}


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict]:
    """Trainable parameters in two optimiser groups: decayed, and not.

    Tensors of fewer than two dimensions and those with a name of `NO_DECAY_NAMES` are not decayed.
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim < 2 or any(word in name for word in NO_DECAY_NAMES)
                groups[plain]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def peak_rate(player: str, config: DictConfig) -> float:
    """`optimizer.params.PLAYER_learning_rate` where there is one; the schedule's own otherwise."""
    return config.optimizer.params.get(f"{player}_learning_rate", config.lr_scheduler.params.learning_rate)


def learning_rate(step: int, *, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to `peak`, cosine to `end` at `total_steps`, `end` for good afterwards.

    Args:
        step: Index of the update, 0 for the first, which therefore has rate 0 where there is a warm-up.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return end + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - end)


class EMA:
    """A deep copy of a model that follows it; use `.model` directly, it is always in evaluation mode.

    Trainable parameters are averaged; untrained ones and buffers are copied at every update, as published.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int) -> None:
        """Move towards `model`; `num_updates` is how many updates came before this one."""
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        ours, theirs = self.model.state_dict(), model.state_dict()
        averaged = [name for name in ours if name in trained]
        average = get_ema_multi_avg_fn(ema_decay(num_updates))
        average([ours[name] for name in averaged], [theirs[name] for name in averaged], num_updates)
        for name in ours.keys() - trained:
            ours[name].copy_(theirs[name])


def ema_decay(num_updates: int) -> float:
    """Decay of the EMA update that follows `num_updates` others: 0 (a copy), then 2/11, 3/12, ... up to 0.999."""
    return min(0.999, (1 + num_updates) / (10 + num_updates)) if num_updates else 0.0
