"""GroupNorm followed by SiLU, as one operation where that is faster."""

import functools
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_NUMBERS = 2**31 - 2**13  # of an image: the kernels' indices within one have 32 bits, and reach beyond its end


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU(norm(x)) of (B, C, H, W).

    On CUDA by Triton kernels of our own, channels-last, with statistics in float32 and a result of the type of `x`:
    torch's GroupNorm computes in float32 under autocast and turns channels-last into channels-first, which with the
    conversions around it was four fifths of a pixel decoder (docs/benchmarks.md). Everywhere else `plain_norm_silu`.
    """
    if _suits(x, norm) and (kernels := _kernels(x.device)) is not None:
        return kernels.GroupNormSiLU.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return plain_norm_silu(x, norm)


def plain_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """SiLU(norm(x)); without gradients SiLU is in place, because new memory costs more than the arithmetic."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())


def has_kernels(device: torch.device) -> bool:
    """Whether `norm_silu` is a kernel there; compiling what it is in then gains nothing."""
    return device.type == "cuda" and _kernels(device) is not None


def _suits(x: Tensor, norm: nn.GroupNorm) -> bool:
    return (
        x.device.type == "cuda"
        and x.numel() > 0
        and x.shape[1:].numel() <= MOST_NUMBERS
        and x.dtype in KERNEL_DTYPES
        and all(number & (number - 1) == 0 for number in (norm.num_channels, norm.num_groups))
        and not torch.compiler.is_compiling()  # which fuses them itself
    )


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The kernels, tried once on a device; None, and a warning, where they fail, as without Triton or a C compiler."""
    try:
        from modeling.modules import group_norm_kernels

        x = torch.ones(1, 1, 1, 1, device=device)
        group_norm_kernels.GroupNormSiLU.apply(x, x.flatten(), x.flatten(), 1, 1e-6)
    except Exception as error:  # Triton, the compiler and the driver raise errors of many classes
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        print(f"warning: GroupNorm runs by torch, which is slower: no Triton kernels ({reason})", file=sys.stderr)
        return None
    return group_norm_kernels
