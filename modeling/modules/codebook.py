"""Help against codebook collapse in small and short training runs."""

import torch
import torch.distributed
from torch import Tensor

from modeling.modules.quantizer import VectorQuantizer
from utils.errors import UserError

POOL_PER_CODE = 16


class CodebookCare:
    """Looks after a quantizer's codes while it trains (`training.codebook` in the configs).

    First the encoder learns without being quantised, for `warmup_steps`; then the codebook starts where its outputs
    are, by k-means; after that, codes that nothing chose for `restart_every` steps move to recent outputs. All off
    (0, False, 0) is the published training; a frozen codebook (stage 2) is left alone. Vectors are watched through a
    forward hook.

    Args:
        total_steps: Of the training.

    Raises:
        UserError: The codebook would never start from k-means, or never be used.

    Attributes:
        state: What a resumed run needs: `pool`, recent (normalised) encoder outputs; `filled`, how many were ever put
            into it; `used`, how often each code was chosen since the last restart.
    """

    def __init__(
        self, quantizer: VectorQuantizer, total_steps: int, *, warmup_steps: int, kmeans: bool, restart_every: int
    ):
        self.quantizer = quantizer
        if not quantizer.embedding.weight.requires_grad:
            warmup_steps, kmeans, restart_every = 0, False, 0
        if kmeans and not warmup_steps:
            raise UserError("training.codebook.kmeans places the codes after warmup_steps, which must be at least 1")
        if warmup_steps >= total_steps > 0:
            raise UserError(
                f"training.codebook.warmup_steps ({warmup_steps}) must be fewer than training.max_train_steps "
                f"({total_steps}): until then nothing is quantised"
            )
        self.warmup_steps, self.kmeans, self.restart_every = warmup_steps, kmeans, restart_every
        codes, channels = quantizer.embedding.weight.shape
        self.state: dict[str, Tensor] = {}
        if kmeans or restart_every:
            self.state = {
                "pool": torch.zeros(POOL_PER_CODE * codes, channels),
                "filled": torch.zeros((), dtype=torch.long),
                "used": torch.zeros(codes, dtype=torch.long),
            }
            quantizer.register_forward_hook(self._watch)
        self._done_at = -1

    def begin(self, step: int) -> None:
        """Call before the forward passes of `step`; changes the codebook when it is time to."""
        self.quantizer.bypass = step < self.warmup_steps
        if step == self._done_at:
            return  # a further micro-batch of the same step
        self._done_at = step
        if self.kmeans and step == self.warmup_steps and int(self.state["filled"]):
            self._place(self._kmeans())
            self.state["used"].zero_()  # choices among the codes before
        elif self.restart_every and step > self.warmup_steps and step % self.restart_every == 0:
            if int(self.state["filled"]):  # not where a run is resumed that had no restarts before
                self._restart()

    @torch.no_grad()
    def _watch(self, quantizer: VectorQuantizer, inputs: tuple[Tensor], output: tuple) -> None:
        if not quantizer.training:
            return
        vectors = quantizer.normalize(inputs[0].detach().float().movedim(1, -1)).flatten(0, -2)
        pool, filled, used = self.state["pool"], self.state["filled"], self.state["used"]
        chosen = torch.randperm(len(vectors))[: len(pool) // 8]
        some = vectors[chosen.to(vectors.device, non_blocking=True)]
        where = (filled + torch.arange(len(some), device=pool.device)) % len(pool)
        pool[where] = some
        filled += len(some)
        codes = output[1]["min_encoding_indices"].flatten()
        used.scatter_add_(0, codes, torch.ones_like(codes))

    def _pool(self) -> Tensor:
        return self.state["pool"][: int(self.state["filled"])]

    def _kmeans(self, iterations: int = 25) -> Tensor:
        """Centres of the pool's clusters (Lloyd's algorithm; on the sphere where vectors are normalised)."""
        pool, count = self._pool(), self.quantizer.codebook_size
        centres = _sample(pool, count)
        for _ in range(iterations):
            # 2^14 at once: of all, the distances to a large codebook would fill the memory.
            nearest = torch.cat([torch.cdist(some, centres).argmin(dim=1) for some in pool.split(2**14)])
            sums = torch.zeros_like(centres).index_add_(0, nearest, pool)
            sizes = torch.bincount(nearest, minlength=count)
            empty = sizes == 0
            centres = self.quantizer.normalize(sums / sizes.clamp(min=1)[:, None])
            centres[empty] = _sample(pool, int(empty.sum()))
        return centres

    def _restart(self) -> None:
        used = self.state["used"]
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(used)
        dead = used == 0
        codebook = self.quantizer.normalize(self.quantizer.embedding.weight.detach().clone())
        codebook[dead] = _sample(self._pool(), int(dead.sum()))
        self._place(codebook)
        used.zero_()

    @torch.no_grad()
    def _place(self, codebook: Tensor) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(codebook, src=0)
        self.quantizer.embedding.weight.copy_(codebook)


def _sample(vectors: Tensor, count: int) -> Tensor:
    """`count` of the vectors, without repetition where there are enough."""
    order = torch.randperm(max(len(vectors), count))[:count] % len(vectors)
    return vectors[order.to(vectors.device)]


def codebook_summary(counts: Tensor) -> dict[str, float]:
    """Usage (share of codes seen), perplexity (2^entropy) and dead codes of how often each code was chosen (V,)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-12).log2()).sum()
    return {
        "codebook/usage": float((counts > 0).double().mean()),
        "codebook/perplexity": float(2**entropy),
        "codebook/dead_codes": int((counts == 0).sum()),
    }
