"""A stand-in for an Apple GPU, which has no float64: on the CPU, tensors that were not moved off it refuse float64."""

import torch
from torch.overrides import TorchFunctionMode


class Moved(torch.Tensor):
    """A tensor that `.cpu()` has moved, and what is computed from it."""


class AppleGPU(TorchFunctionMode):
    """Inside, the CPU plays an Apple GPU: making float64 of a tensor of another type is its error, until `.cpu()`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__ == "cpu":
            return result.as_subclass(Moved)
        on_device = [arg for arg in args if isinstance(arg, torch.Tensor) and not isinstance(arg, Moved)]
        is_double = isinstance(result, torch.Tensor) and result.dtype == torch.float64
        if is_double and any(tensor.dtype != torch.float64 for tensor in on_device):
            raise TypeError(
                f"Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64 ({func})"
            )
        return result
