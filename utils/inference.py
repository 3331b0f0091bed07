"""How a command runs its networks: in which precision, compiled or not, and how many images at a time."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from numbers import Integral

import psutil
import torch
import torch.distributed
from torch import nn

from utils.errors import UserError
from utils.evaluation.protocol import exact_arithmetic
from utils.replay import replay_blocks
from utils.speed import compile_blocks, cpu_has_bfloat16, cpu_has_float16, pays_to_compile

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DOUBLE = "fp64"
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
Arithmetic = Callable[[], AbstractContextManager[None]]

AUTO = "auto"
LARGEST_BATCH = 1024  # that `largest_batch` tries
LEAST_GAIN = 1.05  # in images/s, for which a batch is worth its double size
MEMORY_SHARE = 0.5  # of what is free that a batch may add


def add_model_arguments(parser: argparse.ArgumentParser, what: str, bundled: str) -> None:
    """--config and --checkpoint of a command that runs a model, such as "generator", or `bundled` by default."""
    parser.add_argument("--config", help=f"configuration of the {what} (default: the checkpoint's own)")
    parser.add_argument(
        "--checkpoint",
        help=f"the {what}: hub id, folder made by save_pretrained, training output or one of its checkpoints, weights "
        "file, bundled model, or a step number of the config's output folder (default: the run in the config's output "
        f"folder, else the published model that the config names; without a config {bundled})",
    )


def add_speed_arguments(parser: argparse.ArgumentParser, default: str = "fp32", with_double: bool = False) -> None:
    """--precision and --compile, which `prepared` obeys; with `with_double` also fp64."""
    parser.add_argument(
        "--precision",
        choices=[*PRECISIONS, DOUBLE] if with_double else PRECISIONS,
        default=default,
        help="arithmetic of decoding and of generators; images are encoded in float32, since bf16 changes 1.4%% of the "
        f"tokens{f' ({DOUBLE}: in float64)' if with_double else ''} (default: %(default)s)",
    )
    add_compile_argument(parser)


def add_compile_argument(parser: argparse.ArgumentParser, when: str = "auto: on CUDA for many images") -> None:
    """--compile and --no-compile; without either None, for `pays_to_compile`."""
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"compile the networks' blocks first (torch.compile), which takes up to a minute (default: {when})",
    )


def prepared(arguments: argparse.Namespace, *models: nn.Module, num_passes: int = 0) -> Arithmetic:
    """Compile `models` if --compile says so, and give the context in which they compute as --precision says.

    `arguments.compile` is then what was done; on CUDA, small batches of what is not compiled are replayed. `num_passes`
    is as for `pays_to_compile`.

    Outside that context, where images are encoded, everything is in full float32; with fp64 the models are in float64.
    """
    device = next(models[0].parameters()).device
    if arguments.precision == DOUBLE:
        if device.type == "mps":
            raise UserError(f"an Apple GPU has no {DOUBLE}: add --device cpu, or leave out --precision {DOUBLE}")
        for model in models:
            model.double()
    arguments.compile = pays_to_compile(arguments.compile, device, num_passes)
    for model in models:
        if arguments.compile:
            compile_blocks(model)
        elif device.type == "cuda":
            replay_blocks(model)
    if _is_main() and not _has_arithmetic(arguments.precision, device):
        print(
            f"warning: --precision {arguments.precision} is emulated here and slower than fp32 "
            f"(this {device.type} has no arithmetic for it)",
            file=sys.stderr,
        )
    exact_arithmetic()
    return partial(_arithmetic, arguments.precision, device)


@contextmanager
def _arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    if precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        with torch.autocast(device.type, dtype=HALF.get(precision), enabled=precision in HALF):
            yield
    finally:
        exact_arithmetic()


def frozen_arithmetic(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """The context in which a frozen network encodes in training, whatever autocast is around: "fp32" or "bf16"."""
    if precision not in ("fp32", "bf16"):
        raise UserError(f"training.frozen_precision must be fp32 or bf16, got {precision}")
    return torch.autocast(device.type, dtype=HALF.get(precision), enabled=precision in HALF)


def _has_arithmetic(precision: str, device: torch.device) -> bool:
    if device.type == "cpu" and precision == "bf16":
        return cpu_has_bfloat16()
    if device.type == "cpu" and precision == "fp16":
        return cpu_has_float16()
    if device.type == "cuda" and precision == "bf16":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def add_batch_size_argument(
    parser: argparse.ArgumentParser, what: str, default: int | None = None, default_is: str = "%(default)s"
) -> None:
    """A --batch_size that may be auto, for `choose_batch_size`."""
    parser.add_argument(
        "--batch_size",
        type=parse_batch_size_or_auto,
        default=default,
        metavar="N|auto",
        help=f"{what}; auto finds the largest that pays (default: {default_is})",
    )


def parse_batch_size(text: str) -> int:
    """The value of a --batch_size that must be a number."""
    return _batch_size(text, "a whole number of 1 or more")


def parse_batch_size_or_auto(text: str) -> int | str:
    """The value of a --batch_size that `choose_batch_size` reads."""
    return AUTO if text == AUTO else _batch_size(text, "a whole number of 1 or more, or auto")


def _batch_size(text: str, expected: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return int(text)


def parse_lengths(texts: str | Sequence[str], num_tokens: int | None = None) -> list[int]:
    """The token counts of --lengths: "1,4" or ["16", "1,4"] as [1, 4, 16], sorted, each once.

    Args:
        num_tokens: As many as the tokenizer has; not given, it is not known yet.

    Raises:
        UserError: A word is no whole number, or some are not in 1..num_tokens; it names them all.
    """
    text = texts if isinstance(texts, str) else ",".join(texts)
    try:
        lengths = sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise UserError(f"--lengths takes whole numbers such as 1,4,16, got {text}") from error
    check_lengths(lengths, num_tokens, "--lengths")
    return lengths


def check_lengths(lengths: Sequence[int], num_tokens: int | None, flag: str) -> None:
    """Refuse token counts that no prefix of `num_tokens` tokens has."""
    most = math.inf if num_tokens is None else num_tokens
    wrong = [length for length in lengths if not (isinstance(length, Integral) and 1 <= length <= most)]
    if wrong:
        allowed = "1 or more" if num_tokens is None else f"in 1..{num_tokens}"
        raise UserError(
            f"{flag} must be {allowed}, got {', '.join(map(str, wrong))}"
            + ("" if num_tokens is None else f": there are {num_tokens} tokens")
        )


def choose_batch_size(
    asked: int | str, turn: Callable[[int], object], device: torch.device, most: int = LARGEST_BATCH
) -> int:
    """The number of images at a time: the one asked for or, for "auto", the largest that pays, found by trying.

    All processes come here together and leave with the same, the least of what they find.

    Args:
        turn: Does the work of a batch of so many images.
        most: As many as there are.
    """
    if isinstance(asked, int):
        return asked
    size = torch.tensor(largest_batch(turn, device, most))
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MIN)
    if _is_main():
        print(f"batch size     {size}: the largest that fits and pays", flush=True)
    return int(size)


def largest_batch(turn: Callable[[int], object], device: torch.device, most: int = LARGEST_BATCH) -> int:
    """The batch size, doubled from 1 on while the next one fits and gives `LEAST_GAIN` times the images/s."""
    most = min(most, LARGEST_BATCH)
    before = psutil.Process().memory_info().rss
    size, speed = 1, _images_per_second(turn, 1, device)
    while 2 * size <= most and (device.type == "cuda" or _peak_memory() - before <= _memory_to_add()):
        try:
            doubled = _images_per_second(turn, 2 * size, device)
        except torch.OutOfMemoryError:
            break
        if doubled < LEAST_GAIN * speed:
            break
        size, speed = 2 * size, doubled
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what larger batches needed, the features of other networks may need now
    return size


def _images_per_second(turn: Callable[[int], object], size: int, device: torch.device) -> float:
    """The better of two turns, after one that compiles and takes memory."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        turn(size)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds[1:])


def _peak_memory() -> int:
    """The most bytes that this process has held."""
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _memory_to_add() -> float:
    """Bytes that this process may take beyond what it holds: twice the images take twice the memory."""
    return MEMORY_SHARE * psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
