"""Small batches on CUDA: what a block of a network does is recorded once for each kind of input, and replayed.

One image keeps a GPU busy for a third of the time in which its hundreds of kernels are launched one by one; a CUDA
graph launches those of a block together (docs/benchmarks.md).
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

SMALL_BATCH = 16  # images, up to which launching takes longer than computing
MOST_KINDS = 32  # of inputs that a block remembers, such as lengths of a sequence
_LOCK = threading.RLock()  # recordings share their memory
_observed = False  # every operation must be seen: nothing is recorded or replayed

Recorder = Callable[[Callable[..., Tensor], tuple[Any, ...]], Callable[..., Tensor]]


def replay_blocks(model: nn.Module) -> None:
    """Replay the blocks that a network repeats, the members of its `nn.ModuleList`s, where that helps; in place."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if not isinstance(block.forward, Replayed):
                    block.forward = Replayed(block, record_graph)


@contextlib.contextmanager
def observed() -> Iterator[None]:
    """Inside, blocks run as ever, so that what counts operations sees all of them."""
    global _observed
    before, _observed = _observed, True
    try:
        yield
    finally:
        _observed = before


class Replayed:
    """A block's `forward`, replayed without gradients from the third call with the same kind of inputs on.

    The first call is as ever, and makes libraries choose and compile; the second is recorded. Where recording fails,
    one sentence says so, and the block runs as ever for good.

    Args:
        record: Gives, for a function and inputs, a function that does the same for other values of the same kind.
        device_type: Of what is replayed.
    """

    def __init__(self, block: nn.Module, record: Recorder, device_type: str = "cuda"):
        self.block, self.forward, self.record, self.device_type = block, block.forward, record, device_type
        self.replays: dict[Hashable, Callable[..., Tensor] | None] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        if not self._suits(inputs):
            return self.forward(*inputs)
        kind = self._kind(inputs)
        with _LOCK:
            if kind in self.replays and self.replays[kind] is None:
                self.replays[kind] = self._recorded(inputs)
            replay = self.replays.get(kind)
            if replay is not None:
                return replay(*inputs)
            if len(self.replays) < MOST_KINDS:
                self.replays[kind] = None
        return self.forward(*inputs)

    def _suits(self, inputs: tuple[Any, ...]) -> bool:
        tensors = [one for one in inputs if isinstance(one, Tensor)]
        return (
            not (_observed or torch.is_grad_enabled() or torch.compiler.is_compiling() or self.block.training)
            and all(one is None or isinstance(one, Tensor) for one in inputs)
            and all(one.device.type == self.device_type for one in tensors)
            and 0 < len(tensors[0]) <= SMALL_BATCH
        )

    def _kind(self, inputs: tuple[Any, ...]) -> Hashable:
        """Everything on which the kernels and their addresses depend, but the values of the inputs."""
        about = [one if one is None else (one.shape, one.stride(), one.dtype, one.device) for one in inputs]
        weights = tuple(one.data_ptr() for one in (*self.block.parameters(), *self.block.buffers()))
        precision = torch.is_autocast_enabled(self.device_type), torch.get_autocast_dtype(self.device_type)
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        # Inference mode's own tensors may not be written to outside it.
        return (*about, weights, precision, tf32, torch.is_inference_mode_enabled())

    def _recorded(self, inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
        try:
            return self.record(self.forward, inputs)
        except RuntimeError as error:  # of torch and CUDA: something that cannot be recorded, or no memory
            _warn((str(error).splitlines() or [""])[0])
            self.record = lambda forward, inputs: forward
            return self.forward


@functools.cache
def _warn(reason: str) -> None:
    print(f"warning: one image at a time is slower than it could be: no CUDA graph ({reason})", file=sys.stderr)


@functools.cache
def _side(device: torch.device) -> dict[str, Any]:
    """What recordings on a device share: their stream, which must be the device's own, and their memory."""
    return {"stream": torch.cuda.Stream(device), "pool": torch.cuda.graph_pool_handle()}


def record_graph(function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Callable[..., Tensor]:
    """A `Recorder`: `function` as a CUDA graph, and what copies inputs into it and its result out of it."""
    own = [one if one is None else one.clone() for one in inputs]
    device = own[0].device
    # Also where recording fails, what follows runs on the stream of before.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)), _autocast_without_cache():
        graph = torch.cuda.CUDAGraph()
        # Other threads may compute meanwhile; a weight that autocast has cast before would be gone at the replay.
        with torch.cuda.graph(graph, **_side(device), capture_error_mode="thread_local"):
            result = function(*own)

    def replay(*given: Any) -> Tensor:
        for mine, other in zip(own, given, strict=True):
            if mine is not None:
                mine.copy_(other)
        graph.replay()
        return result.clone()

    return replay


def _autocast_without_cache() -> AbstractContextManager[None]:
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    return torch.autocast("cuda", dtype=dtype, enabled=enabled, cache_enabled=False)
