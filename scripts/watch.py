"""Show how a training run is getting on: loss, speed, time left, evaluation, last checkpoint, bad samples.

    python3 scripts/watch.py checkpoints/fashion_stage1
    python3 scripts/watch.py checkpoints/fashion_stage1 --once --plot curves.png

It reads the run's metrics.jsonl and changes nothing, so it works during training, after it, and on another machine that
sees the folder. --plot draws losses, gradient norms and evaluations over the steps, and replaces its own figures alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import contextlib
import itertools
import signal
import time
from collections.abc import Iterator

from utils.config import RUN_CONFIG, load_config
from utils.errors import UserError
from utils.figures import FORMATS, write_figure
from utils.result_folder import ResultPaths
from utils.training.progress import draw, read_metrics, summary

CLEAR = "\033[H\033[J"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="the run's experiment.output_dir")
    parser.add_argument("--interval", type=float, default=5.0, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="show it once and exit")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves as FILE.png and FILE.pdf")
    arguments = parser.parse_args()
    if arguments.interval <= 0:
        raise UserError(f"--interval must be above 0 seconds, got {arguments.interval}")
    with tidied_up(), ResultPaths(flag="--plot") as results:
        watch(arguments, results)


@contextlib.contextmanager
def tidied_up() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal end this as an error would, so that figures are noted as ours."""
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
    before = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(arguments: argparse.Namespace, results: ResultPaths) -> None:
    figures = figures_of(arguments.plot) if arguments.plot else []
    results.claim(*figures)
    for number in itertools.count():
        lines = read_metrics(arguments.folder)
        total = load_config(arguments.folder / RUN_CONFIG).training.max_train_steps
        if number and sys.stdout.isatty():
            print(CLEAR, end="")
        print(summary(arguments.folder, lines, total, now=time.time()), flush=True)
        if figures:
            if not number:
                for path in figures:
                    results.place(path)
            write_figure(draw(lines, title=str(arguments.folder)), figures[0].with_suffix(""))
            print(f"wrote {figures[0]} and {figures[1].name}", flush=True)
        if arguments.once or lines[-1]["step"] >= total:
            return
        time.sleep(arguments.interval)


def figures_of(path: Path) -> list[Path]:
    """FILE.png and FILE.pdf, of FILE with one of these endings or without."""
    stem = path.with_suffix("") if path.suffix.lower().removeprefix(".") in FORMATS else path
    return [stem.with_name(f"{stem.name}.{ending}") for ending in FORMATS]


if __name__ == "__main__":
    run(main)
