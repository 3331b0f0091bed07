"""Measure how fast the models run here, against what this machine's arithmetic can do.

    python3 scripts/benchmark.py
    python3 scripts/benchmark.py --model S L --only encode decode --precision bf16 --batch_size 64 --json speed.json

A large matrix product and a convolution give the machine's ceilings in the same precision. An item's share of the
ceiling is the time that its arithmetic (counted by torch) would take at the ceilings, over the time that it took.
Times are medians after a warm-up, items and ceilings taking turns, so that a busy machine slows both alike. Weights and
images are random: neither changes the amount of work.

    python3 scripts/benchmark.py --only reconstruct sample --against HEAD~20
    python3 scripts/benchmark.py --only reconstruct sample --precision bf16 --against plain

times each item in turn here and by the benchmark of another revision of this repository, or done plainly: eagerly,
in float32, in torch's default layouts, by torch's own choice of library and memory.

    python3 scripts/benchmark.py --model S --only decode --lengths 1 2 4 8 16 32 64 128 256 --figure lengths.png
    python3 scripts/benchmark.py --model S --only reconstruct stage1 --processes 1 2 --figure processes.png

show how cost grows. Several processes share the threads, take every turn together, and train as data-parallel ranks;
their images, arithmetic and memory are added up, and a turn lasts until the slowest has done it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import pick_device, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import os
from functools import partial
from typing import Any

import torch

from codec.benchmark_items import payloads
from data.benchmark_loader import load, pretokenize, reconstruct
from modeling import benchmark_items
from modeling.tokenizers import encode_tokens
from utils.benchmark.arguments import parse_arguments
from utils.benchmark.items import settings
from utils.benchmark.peers import serve
from utils.benchmark.report import against, alone
from utils.errors import UserError
from utils.files import write_json

ITEMS = {
    "encode": benchmark_items.encode,
    "decode": benchmark_items.decode,
    "attention": benchmark_items.attend,
    "precisions": benchmark_items.compare_precisions,
    "stage1": benchmark_items.train_stage1,
    "stage2": benchmark_items.train_stage2,
    "generator": benchmark_items.train_generator,
    "sample": benchmark_items.sample,
    "drafts": benchmark_items.drafts,
    "reconstruct": partial(reconstruct, benchmark_items.tokenizer),
    "contribution": benchmark_items.contribute,
    "loader": load,
    "pretokenize": partial(pretokenize, benchmark_items.tokenizer, encode_tokens),
    "checkpoint": benchmark_items.checkpoint,
    "payloads": payloads,
}


def main() -> None:
    # The profiler, which counts memory, would complain of the lack of a GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    arguments = parse_arguments(__doc__, ITEMS)
    if arguments.plain:
        benchmark_items.compute_plainly()
    if arguments.serve:
        serve(arguments, ITEMS, benchmark_items.products)
        return
    torch.set_num_threads(max(1, torch.get_num_threads() // max(arguments.processes)))
    device = pick_device(arguments.device)
    if arguments.clock == "cpu" and device.type != "cpu":
        raise UserError(f"--clock cpu cannot time what {device} does: leave it out, or give --device cpu")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    compiled = settings(arguments)[0].compile
    how = f"{arguments.precision}, {'compiled' if compiled else 'eager'}, {arguments.clock} clock"
    title = f"{place}, threads: {torch.get_num_threads()}, {how}, torch {torch.__version__}"
    print(title)
    about = {
        "device": place,
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "compile": compiled,
        "clock": arguments.clock,
        "torch": torch.__version__,
    }

    def record(found: dict[str, Any]) -> None:
        if arguments.json:
            write_json(arguments.json, about | found)

    if arguments.against:
        record(against(arguments, record))
    else:
        record(alone(arguments, ITEMS, benchmark_items.products, title))


if __name__ == "__main__":
    run(main, keeps_memory="--plain" not in sys.argv)
