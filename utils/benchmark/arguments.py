"""The command line of scripts/benchmark.py."""

import argparse
from pathlib import Path
from typing import Any

from utils.benchmark.items import CONFIGS, DTYPES, RECOMMENDED, Items
from utils.benchmark.measure import CLOCKS, NUM_OPERATORS
from utils.benchmark.peers import PLAIN
from utils.cli import Parser
from utils.errors import UserError
from utils.inference import add_compile_argument
from utils.replay import SMALL_BATCH

ALL = "all"
DEFAULT_ITEMS = ["encode", "decode", "stage1", "sample"]  # under a minute for the tiny model


def parse_arguments(description: str, items: Items) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UserError: Numbers below 1, or flags that do not go together.
    """
    arguments = _parser(description, items).parse_args()
    if ALL in arguments.only:
        arguments.only = list(items)
    counts = {name: getattr(arguments, name) or [] for name in ("batch_size", "lengths", "processes")}
    for name, values in (counts | {"repeats": [arguments.repeats]}).items():
        if any(value < 1 for value in values):
            raise UserError(f"--{name} must be 1 or more, got {min(values)}")
    alone_only = arguments.figure or arguments.profile
    if arguments.against and (alone_only or len(counts["batch_size"]) > 1 or counts["processes"] != [1]):
        raise UserError(
            "--against compares one process here with one there: give it a single --batch_size, and no --processes, "
            "--figure or --profile"
        )
    if arguments.figure and varied(arguments) is None:
        raise UserError(
            "--figure needs something that varies, got one of each: give several --processes, several --batch_size, or "
            "--only decode with several --lengths"
        )
    return arguments


def varied(arguments: argparse.Namespace) -> str | None:
    """What a figure goes along: a field of `Measurement`."""
    if len(arguments.processes) > 1:
        return "processes"
    if len(arguments.batch_size or []) > 1:
        return "batch_size"
    return "length" if len(arguments.lengths) > 1 and "decode" in arguments.only else None


def _parser(description: str, items: Items) -> argparse.ArgumentParser:
    parser = Parser(description)
    add = parser.add_argument
    sizes = f"the bundled models', published ones, or {RECOMMENDED}: the training that docs/findings.md recommends"
    add("--model", nargs="+", choices=CONFIGS, default=["tiny"], help=f"sizes: {sizes} (default: tiny)")
    default = " ".join(DEFAULT_ITEMS)
    choices = [*items, ALL]
    add("--only", nargs="+", choices=choices, default=DEFAULT_ITEMS, help=f"what to measure (default: {default})")
    numbers: dict[str, Any] = {"nargs": "+", "type": int, "metavar": "N"}
    add("--batch_size", **numbers, help="images at a time (default: 32; on a CPU 16 for tiny, 4 for the others)")
    lengths = [8, 64, 256]
    add("--lengths", **numbers, default=lengths, help="tokens to decode; all, if a model has fewer (default: 8 64 256)")
    add("--processes", **numbers, default=[1], help="how many at the same time, in training as ranks (default: 1)")
    add("--precision", choices=DTYPES, default="fp32", help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timings to take the median of (default: %(default)s)")
    add_compile_argument(parser, f"on CUDA, for batches above {SMALL_BATCH}")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the process's own seconds, for one thread on a machine that has other work (default: %(default)s)",
    )
    there = f"time a git revision (or a folder with its files) as well, or {PLAIN}: print ratios"
    add("--against", metavar="REVISION", help=there)
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    add("--plain", action="store_true", help=argparse.SUPPRESS)
    add("--profile", action="store_true", help=f"print the {NUM_OPERATORS} most expensive operators of a turn")
    add("--figure", type=Path, metavar="FILE", help="draw the growth along several values as FILE.png and FILE.pdf")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    return parser
