"""Time, arithmetic and memory of a work, and what this machine's arithmetic does at best."""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from utils.benchmark.items import Items, Setting, Work, allow_tf32, settings
from utils.replay import observed

SHORTEST = 0.05  # seconds: what is quicker is timed several times in a row
# Side of the matrices; batch, channels and side of the images: large enough to keep the device busy.
CEILING_SIZES = {"cpu": (2048, 4, 128, 64), "other": (8192, 32, 256, 128)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COPIED = 2**28  # bytes
NUM_OPERATORS = 12  # of a profile

Product = Callable[[Tensor, Tensor], Tensor]
# The libraries that multiply matrices in a setting: x W^T of two matrices x and W, by the library's name.
Products = Callable[[Setting], Mapping[str, Product]]


@dataclass(frozen=True)
class Measurement:
    """What was found of one item; times in seconds, work in floating-point operations, memory in bytes.

    Memory is that of tensors, at its peak, beyond what there was before. Rates, work and memory are of all processes,
    the batch is that of each.
    """

    model: str
    item: str
    length: int | None
    batch_size: int
    processes: int
    seconds: float
    images_per_second: float | None
    flops: int
    flops_per_second: float
    share_of_ceiling: float | None
    peak_memory: int
    share_of_training: float | None


# ------------------------------------------------------------------------------------------- time


def time_turns(turn: Callable[[], object], setting: Setting, count: int = 1) -> float:
    """Seconds a turn, of `count` turns in a row."""
    if setting.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            turn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / count
    clock = CLOCKS[setting.clock]
    begun = clock()
    for _ in range(count):
        turn()
    if setting.device.type != "cpu":
        torch.accelerator.synchronize()
    return (clock() - begun) / count


class Timer:
    """Seconds a turn of a work, warm; what is short is timed several times in a row. `flops` are those of a turn."""

    def __init__(self, work: Work, setting: Setting):
        self.work, self.setting = work, setting
        self.flops = count_flops(work.turn)  # this warms up, too
        # But nothing is compiled, recorded or replayed meanwhile: a block of a network is recorded at its second turn.
        for _ in range(2 if setting.device.type == "cuda" else int(setting.compile)):
            work.turn()
        self.count = max(1, round(SHORTEST / time_turns(work.turn, setting)))

    def __call__(self) -> float:
        return time_turns(self.work.turn, self.setting, self.count)


Timers = dict[str, Timer]  # of the two ceilings, and of the "work" that takes turns with them


def medians(timers: Mapping[str, Callable[[], float]], num_repeats: int) -> dict[str, float]:
    """Median seconds of each, all taking turns."""
    times = [{name: timer() for name, timer in timers.items()} for _ in range(num_repeats)]
    return {name: statistics.median(time[name] for time in times) for name in timers}


# ------------------------------------------------------------------------------------------- arithmetic and memory


def count_flops(turn: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations of one turn, those of convolutions apart; forward and backward."""
    with observed(), FlopCounterMode(display=False, custom_mapping=ONEDNN_FLOPS) as counter:
        turn()
    counts = counter.get_flop_counts().get("Global", {})
    convolution = sum(count for operator, count in counts.items() if "convolution" in str(operator))
    return {"matmul": counter.get_total_flops() - convolution, "convolution": convolution}


def linear_flops(x: Sequence[int], weight: Sequence[int], *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


# oneDNN's linear layer, an operator of torch that is not public: another version may lack it.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
ONEDNN_FLOPS = {_ONEDNN_LINEAR: linear_flops} if _ONEDNN_LINEAR is not None else {}


def peak_memory(turn: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that one turn adds to those there were."""
    if device.type == "cuda":
        gc.collect()  # what earlier items left behind, which could be freed meanwhile
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        turn()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        turn()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def operators(turn: Callable[[], object], device: torch.device) -> str:
    """A table of the operators of one turn that take the most time by themselves."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        turn()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=NUM_OPERATORS, max_name_column_width=40)


# ------------------------------------------------------------------------------------------- the machine's ceilings


def ceilings(setting: Setting, products: Products) -> dict[str, Work]:
    """Arithmetic that this machine does best: a matrix product, and a 3 x 3 convolution.

    By the library and in the layout that are faster: which ones depends on the processor and the precision.
    """
    kind: dict[str, Any] = {"device": setting.device, "dtype": setting.dtype}
    side, batch, channels, pixels = CEILING_SIZES["cpu" if setting.device.type == "cpu" else "other"]
    left, right = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    images, kernel = torch.randn(batch, channels, pixels, pixels, **kind), torch.randn(channels, channels, 3, 3, **kind)

    def convolution(layout: torch.memory_format) -> Callable[[], Tensor]:
        operands = [operand.contiguous(memory_format=layout) for operand in (images, kernel)]
        return lambda: F.conv2d(*operands, padding=1)

    def fastest(ways: Mapping[str, Callable[[], Tensor]]) -> str:
        return min(ways, key=lambda name: min(time_turns(ways[name], setting) for _ in range(3)))

    multiplications = {library: partial(multiply, left, right) for library, multiply in products(setting).items()}
    layouts = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}
    convolutions = {name: convolution(layout) for name, layout in layouts.items()}
    library, layout = fastest(multiplications), fastest(convolutions)
    return {
        "matmul": Work(f"matmul ({library})", multiplications[library]),
        "convolution": Work(f"convolution ({layout})", convolutions[layout]),
    }


def ceiling_timers(setting: Setting, products: Products) -> Timers:
    return {name: Timer(work, setting) for name, work in ceilings(setting, products).items()}


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    timer = Timer(Work("copy", partial(target.copy_, source)), setting)
    return 2 * COPIED / statistics.median(timer() for _ in range(5))


# ------------------------------------------------------------------------------------------- all items


def timed_works(arguments: argparse.Namespace, items: Items, beside: Timers) -> Iterator[tuple[dict[str, Any], Timers]]:
    """Build every work: all there is to say of it but its time, and the timers of it and of what is `beside` it."""
    turns = list(product(settings(arguments), arguments.only))
    for setting, item in tqdm(turns, unit="item", leave=False, disable=arguments.serve):
        allow_tf32(setting.precision == "tf32")  # training may have changed it
        try:
            for work in items[item](setting):
                timers = {"work": Timer(work, setting), **beside}
                yield _about(work, setting, timers, arguments.profile), timers
        except torch.OutOfMemoryError:
            if arguments.serve:  # the others would go on to another item
                raise
            tqdm.write(f"{setting.model:14}{item}: a batch of {setting.batch_size} does not fit into memory")


def _about(work: Work, setting: Setting, timers: Timers, with_profile: bool) -> dict[str, Any]:
    return {
        "model": setting.model,
        "item": work.name,
        "length": work.length,
        "batch_size": setting.batch_size,
        "num_images": work.num_images,
        "every": work.every,
        "flops": {name: timer.flops for name, timer in timers.items()},
        "counts": {name: timer.count for name, timer in timers.items()},
        "peak_memory": peak_memory(work.turn, setting.device),
        "profile": operators(work.turn, setting.device) if with_profile else "",
    }


def measured(
    works: Iterable[tuple[dict[str, Any], Mapping[str, Callable[[], float]]]], num_processes: int, num_repeats: int
) -> Iterator[tuple[Measurement, str]]:
    """Time every work, each in turns with the ceilings; with its profile where that is asked for."""
    seconds = 0.0
    for about, timers in works:
        times = medians(timers, num_repeats)
        before, seconds = seconds, times["work"]
        flops, num_images = about["flops"], num_processes * about["num_images"]
        at_ceilings = sum(count / flops[name][name] * times[name] for name, count in flops["work"].items())
        total = num_processes * sum(flops["work"].values())
        found = Measurement(
            model=about["model"],
            item=about["item"],
            length=about["length"],
            batch_size=about["batch_size"],
            processes=num_processes,
            seconds=seconds,
            images_per_second=num_images / seconds if num_images else None,
            flops=total,
            flops_per_second=total / seconds,
            share_of_ceiling=at_ceilings / seconds if total else None,
            peak_memory=about["peak_memory"],
            share_of_training=seconds / (seconds + about["every"] * before) if about["every"] else None,
        )
        yield found, about["profile"]
