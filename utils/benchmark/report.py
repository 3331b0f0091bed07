"""A benchmark's run: what it prints and records."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from utils.benchmark.arguments import varied
from utils.benchmark.draw import COLUMNS, COMPARED, compared_row, draw, line, row
from utils.benchmark.items import Items, settings
from utils.benchmark.measure import Products, ceiling_timers, copy_bandwidth, measured, medians, timed_works
from utils.benchmark.peers import compare, together
from utils.figures import write_figure


def alone(arguments: argparse.Namespace, items: Items, products: Products, title: str) -> dict[str, Any]:
    """Print the ceilings and a line for each work, and draw; what is to be recorded of it."""
    setting, found = settings(arguments)[0], []
    beside = ceiling_timers(setting, products)
    seconds = medians(beside, arguments.repeats)
    rates = {name: timer.flops[name] / seconds[name] for name, timer in beside.items()}
    copied = copy_bandwidth(setting)
    limits = [f"{timer.work.name} {rates[name] / 1e9:,.0f} GFLOP/s" for name, timer in beside.items()]
    print("ceilings: " + ", ".join([*limits, f"copy {copied / 1e9:,.1f} GB/s"]))
    print("\n" + line(COLUMNS))
    for num_processes in arguments.processes:
        works = timed_works(arguments, items, beside) if arguments.processes == [1] else together(num_processes)
        for measurement, profiled in measured(works, num_processes, arguments.repeats):
            found.append(measurement)
            tqdm.write(line(row(measurement)))
            if (share := measurement.share_of_training) is not None:
                tqdm.write(f"{'':14}as often as the configuration says: {share:.2%} of training time")
            if profiled:
                tqdm.write(profiled)
    if arguments.figure:
        figure = draw(found, varied(arguments), title=f"{', '.join(arguments.model)}: {title}")
        write_figure(figure, arguments.figure.with_suffix(""))
    return {
        "ceilings_flops_per_second": rates,
        "copied_bytes_per_second": copied,
        "results": [asdict(one) for one in found],
    }


def against(arguments: argparse.Namespace, record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Print a line for each work, timed here and there; what is to be recorded of it.

    Args:
        record: Takes what has been found so far, after every work, for a run that does not come to its end.
    """
    print("\n" + line(COMPARED))
    found: list[dict[str, Any]] = []
    so_far = {"against": arguments.against, "results": found}
    for one in compare(arguments.against, arguments.only, arguments.repeats):
        found.append(asdict(one))
        print(line(compared_row(one)), flush=True)
        record(so_far)
    return so_far
