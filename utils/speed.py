"""What makes networks run faster whatever they compute: compiled blocks, kept memory, the processor's abilities.

What torch says and sets in private places alone is asked for so that a torch without them is only slower.
"""

import ctypes
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError

CPU_INFO = Path("/proc/cpuinfo")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
# Each kind of block is compiled for each of its sizes, with gradients and without; torch's own limit is 8.
RECOMPILE_LIMIT = 64
LONG_WORK = 300_000  # images through a network, after which compiling has paid on a GPU
Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., Any]]


def pays_to_compile(asked: bool | None, device: torch.device, num_passes: int) -> bool:
    """Whether to compile: as asked or, where nothing is, on CUDA for long work; on CPUs it brings next to nothing.

    Args:
        num_passes: Images, each as often as a network sees it.
    """
    return device.type == "cuda" and num_passes >= LONG_WORK if asked is None else asked


def asked_to_compile(value: bool | str) -> bool | None:
    """`training.compile` as `pays_to_compile` takes it.

    Raises:
        UserError: It is not one of True, False and auto.
    """
    meanings = {"true": True, "false": False, "auto": None}
    if str(value).lower() not in meanings:  # on a command line, True is text
        raise UserError(f"training.compile must be True, False or auto, got {value}")
    return meanings[str(value).lower()]


def inductor_or_eager(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """torch's compiler as a backend; where it fails, the same operations one by one, and one sentence."""
    try:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)
    except Exception as error:  # compilers, drivers and full disks raise errors of many classes
        _warn_of_eager((str(error).strip().splitlines() or [""])[0] or type(error).__name__)
        return graph.forward


@functools.cache
def _warn_of_eager(reason: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: torch.compile failed, so what it could not compile runs eagerly ({reason})", file=sys.stderr)


def compile_blocks(model: nn.Module, backend: Backend = inductor_or_eager) -> None:
    """Compile (`torch.compile`) the blocks that a network repeats: the members of its `nn.ModuleList`s.

    In place, so the names of the parameters stay what they are. Blocks of one kind and size share their code, and the
    second length of a sequence makes it fit every length: tail drop compiles each kind twice at most.
    """
    if hasattr(torch._dynamo.config, "recompile_limit"):
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                block.compile(backend=backend)


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16; without, torch emulates it, several times slower than float32.

    oneDNN alone says so of every processor with AVX-512, and emulates it on most of them.
    """
    return (
        torch.backends.mkldnn.is_available()
        and known_true(lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and _has_instructions({"avx512_bf16", "amx_bf16", "bf16"}, lambda: torch.cpu._is_avx512_bf16_supported())
    )


def cpu_has_float16() -> bool:
    """As `cpu_has_bfloat16`, of float16."""
    return (
        torch.backends.mkldnn.is_available()
        and known_true(lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported())
        and _has_instructions({"avx512_fp16", "amx_fp16", "fphp"}, lambda: torch.cpu._is_amx_fp16_supported())
    )


def _has_instructions(any_of: set[str], otherwise: Callable[[], bool]) -> bool:
    """Whether the processor has any of some instructions, as Linux names them; where it lists none, `otherwise`."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return known_true(otherwise)
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return line is not None and not any_of.isdisjoint(line[1].split())


def known_true(private: Callable[[], bool]) -> bool:
    """What private functions of torch answer; False where there are none, or other ones."""
    try:
        return private()
    except (AttributeError, RuntimeError, TypeError):
        return False


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones, up to 2 GiB.

    By itself it returns blocks above 32 MiB to the kernel, and on a CPU the clearing of new pages took a fifth of a
    pixel decoder's time.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 2**31 - 1)
