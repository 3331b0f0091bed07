"""The entropy model: predict each token of an image from those before it, so that it costs few bits."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from modeling.causal_network import CausalTokenNetwork


class EntropyTask:
    """Cross-entropy of all tokens.

    Args:
        codes: Code vectors (V, D) of the tokenizer.
        tables: Logits (N, V) in nats that the network starts from and adds to, those of the tables by position.
    """

    def __init__(self, config: DictConfig, codes: Tensor, tables: Tensor):
        self.model = CausalTokenNetwork(config)
        self.model.codes.copy_(codes)
        self.model.tables.copy_(tables)
        self.modules: dict[str, nn.Module] = {"model": self.model}
        self.frozen: list[nn.Module] = []
        self.state: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.sources: dict[str, str] = {}

    def start(self) -> None:
        pass

    def first_step(self, player: str) -> int:
        return 0

    def losses(self, batch: dict[str, Any], step: int) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        loss = bits_of(self.modules["model"](batch["tokens"]), batch["tokens"]).mean() * math.log(2)
        yield "model", loss, {"loss/model": loss, "bits_per_token": loss / math.log(2)}

    def summarize(self, counts: dict[str, Tensor]) -> dict[str, float]:
        return {}

    def evaluate(self, model: CausalTokenNetwork, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"bits_per_token": bits_of(model(batch["tokens"]), batch["tokens"]).mean(dim=1)}

    def preview(self, model: CausalTokenNetwork, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {}


def bits_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """(B, N): -log2 of the probability of each of the tokens (B, N) by logits (B, N, V)."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten(), reduction="none")
    return losses.view_as(tokens) / math.log(2)
