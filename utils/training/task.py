"""What the training loop asks of a task, and all that it knows of a model."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]
Logs = dict[str, Tensor]


class Task(Protocol):
    """What is trained, what is minimised, what is shown. The loop knows nothing else of a model.

    Attributes:
        modules: Trained networks by player, "model" first; the loop replaces them by their wrapped versions.
            "model" has `save_pretrained(folder)`, which writes `model.safetensors`.
        frozen: Networks that are not trained, used in every step, once `start` was called.
        state: Small tensors that belong to the training state and to no network, saved for each rank.
        counts: Counters that the loop sums over the ranks, hands to `summarize` and clears, each time it logs.
        sources: Fingerprints of the weights that training rests on, once `start` was called, by what of the
            configuration names them. A run does not go on with others.
    """

    modules: dict[str, nn.Module]
    frozen: list[nn.Module]
    state: dict[str, Tensor]
    counts: dict[str, Tensor]
    sources: dict[str, str]

    def start(self) -> None:
        """Load the weights that training starts from; not called for a dry run."""
        ...

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Tensor, Logs]]:
        """Yield `(player, loss, logs)` per optimiser update; resumed after that player has stepped."""
        ...

    def first_step(self, player: str) -> int:
        """The step at which `player` is updated for the first time; its learning rate counts from there."""
        ...

    def summarize(self, counts: dict[str, Tensor]) -> dict[str, float]:
        """Numbers for the log from the counters of all ranks."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """One value per image, {name: (B,)}, of a model in evaluation mode."""
        ...

    def preview(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Images to look at, a column each: {title: (B, 3, P, P)} in [0, 1]."""
        ...
