"""Figures of docs/benchmarks.md for a GPU, in one run: the first thing to run on one, eight to nine minutes.

    python3 scripts/prove_gpu.py --output_dir output/gpu
    python3 scripts/prove_gpu.py --output_dir output/gpu --only tests profile    # parts that had no time
    python3 scripts/prove_gpu.py --output_dir output/try --device cpu --model tiny --batch_size 2 --num_steps 2

OUTPUT_DIR/report.md has the tables: every item against another revision, images and losses against float32; behind
them what each part printed last, with profiles and tests/test_cuda.py. It is written anew after every part. A part that
fails or takes too long is left out, but for what it had measured, and the report says so. Where there is no git
repository, a folder with the revision's files stands in for it, 2 MB without what no benchmark reads:

    mkdir 2179dca && git archive 2179dca scripts modeling utils data configs assets/photos | tar -x -C 2179dca

Where there is neither, everything is compared with plain float32.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import pick_device, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import contextlib
import json
import os
import signal
import subprocess
import time
from typing import Any

import torch

from modeling.benchmark_closeness import OURS, VARIANTS, compared, variant
from utils.benchmark.items import CONFIGS, Setting
from utils.benchmark.peers import PLAIN, SCRIPT, checkout
from utils.cli import Parser
from utils.errors import UserError
from utils.files import replacing
from utils.paths import ROOT
from utils.speed import LONG_WORK, pays_to_compile

PATIENCE = 10  # seconds for a command to tidy up
LAST = 12_000  # characters of what a part printed that the report shows
AGAINST = "2179dca"
CLOSENESS = "closeness-"
BENCHMARK = [sys.executable, str(ROOT / "scripts/benchmark.py")]
# Milliseconds at most on an H200, by model, item and batch (issue 20).
TARGETS = {
    ("S", "decode 256", 64): 42,
    ("S", "reconstruct", 64): 50,
    ("S", "reconstruct", 1): 4.5,
    ("S", "stage-1 step", 64): 95,
    ("S", "stage-2 step", 32): 140,
    ("S", "sample", 64): 450,
    ("S", "sample", 1): 45,
    ("S", "generator, tokens", 64): 62,
    ("L", "decode 256", 64): 85,
    ("L", "stage-1 step", 32): 170,
}


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.variant:
        found = {}
        for name, value in variant(setting_of(arguments), arguments.variant, arguments.num_steps):
            found[name] = value
            with replacing(folder / arguments.variant) as path:
                torch.save(found, path)
        return
    began = time.monotonic()
    choose_other_side(arguments)
    lines = [f"# {name_of(arguments.device)}, torch {torch.__version__}, {time.strftime('%F')}\n"]
    lines.append(f"Compared with {arguments.against}.\n")
    names = []
    for name, command, share in parts(arguments):
        if arguments.only and name not in arguments.only:
            continue
        for stale in (f"{name}.json", name.removeprefix(CLOSENESS) if name.startswith(CLOSENESS) else f"{name}.txt"):
            (folder / stale).unlink(missing_ok=True)
        left = arguments.seconds - (time.monotonic() - began)
        outcome = run_part(name, command, min(share * arguments.seconds, left), folder)
        print(f"{name:<18} {outcome}", flush=True)
        names.append(name)
        lines.append(f"- {name}, {outcome}: `{' '.join(Path(word).name for word in command)}`")
        with replacing(folder / "report.md") as path:
            path.write_text("\n".join([*lines, "", *tables(folder, names)]) + "\n")
    print(f"\n{folder / 'report.md'}")


def choose_other_side(arguments: argparse.Namespace) -> None:
    """Where the default revision is neither a folder nor in a git repository, compare with plain float32."""
    for place in (Path(arguments.against), ROOT / arguments.against):
        if (place / SCRIPT).is_file():
            arguments.against = str(place.resolve())
            return
    if arguments.against != PLAIN:
        try:
            with checkout(arguments.against):
                pass
        except (UserError, FileNotFoundError) as error:  # FileNotFoundError: there is no git
            if arguments.against != AGAINST:
                raise
            print(f"warning: compared with {PLAIN} float32 ({error})", file=sys.stderr)
            arguments.against = PLAIN


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="where the files go")
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--model", choices=CONFIGS, help="one size for everything (default: S, and L for two items)")
    add("--batch_size", type=int, default=64, help="images at a time; half in stage 2 (default: %(default)s)")
    add("--num_steps", type=int, default=50, help="training steps whose losses are compared (default: %(default)s)")
    add("--precision", default="bf16", choices=["bf16", "fp32"], help="default: %(default)s")
    add("--against", default=AGAINST, help=f"revision, folder with its files, or {PLAIN} (default: %(default)s)")
    add("--only", nargs="+", metavar="PART", help="parts as the report names them, such as tests (default: all)")
    add("--seconds", type=float, default=530, help="time for everything (default: %(default)s)")
    add("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output_dir = arguments.output_dir.resolve()
    known = [name for name, _, _ in parts(arguments)]
    if wrong := set(arguments.only or ()).difference(known):
        raise UserError(f"--only takes {', '.join(known)}, got {', '.join(sorted(wrong))}")
    return arguments


def parts(arguments: argparse.Namespace) -> list[tuple[str, list[str], float]]:
    """What is run, most important first: its name, its command, and the share of all the time that it may take."""
    batch, device, precision = arguments.batch_size, arguments.device, arguments.precision
    small, large = arguments.model or "S", arguments.model or "L"
    common = [f"--device={device}", f"--precision={precision}", "--lengths=256"]

    def against(name: str, model: str, size: int, *items: str) -> list[str]:
        how = [f"--model={model}", f"--batch_size={size}", f"--against={arguments.against}", "--repeats=3"]
        return [*BENCHMARK, *common, *how, f"--json={arguments.output_dir / name}.json", "--only", *items]

    own = [f"--device={device}", f"--precision={precision}", f"--model={small}", f"--num_steps={arguments.num_steps}"]
    variants = [sys.executable, str(ROOT / "scripts/prove_gpu.py"), *own, f"--output_dir={arguments.output_dir}"]
    profiled = [f"--model={small}", "--repeats=2", "--profile", "--only"]
    quarter, half = max(1, batch // 4), max(1, batch // 2)
    tests = [sys.executable, "-m", "pytest", "-q", "-rP", str(ROOT / "tests/test_cuda.py")]
    return [
        ("table", against("table", small, batch, "encode", "decode", "sample", "reconstruct"), 0.23),
        ("table-training", against("table-training", small, batch, "stage1", "generator"), 0.19),
        ("table-stage2", against("table-stage2", small, half, "stage2"), 0.23),
        ("table-one", against("table-one", small, 1, "reconstruct", "sample"), 0.1),
        *(
            (f"{CLOSENESS}{name}", [*variants, f"--batch_size={quarter}", f"--variant={name}"], 0.14)
            for name in VARIANTS
        ),
        ("table-large", against("table-large", large, batch, "decode"), 0.1),
        # Both sides' memory of a whole batch, 66 GiB each, would not fit beside each other.
        ("table-large-stage1", against("table-large-stage1", large, half, "stage1"), 0.14),
        ("tests", tests, 0.25),
        ("profile", [*BENCHMARK, *common, f"--batch_size={batch}", *profiled, "decode", "stage1"], 0.12),
        ("profile-stage2", [*BENCHMARK, *common, f"--batch_size={half}", *profiled, "stage2"], 0.12),
    ]


def run_part(name: str, command: list[str], seconds: float, folder: Path) -> str:
    """Run a command with its output in a file; how it went, in a few words."""
    if seconds <= 0:
        return "left out, time is up"
    began = time.monotonic()
    with (folder / f"{name}.txt").open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # what is cut off has printed what it had to say
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return f"cut off after {seconds:.0f} s"
    took = f"{time.monotonic() - began:.0f} s"
    return took if status == 0 else f"failed after {took}, see {name}.txt"


def end(process: subprocess.Popen) -> None:
    """End a command and what it has started, which may tidy up first."""
    for reason in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, reason)
            process.wait(PATIENCE)


def tables(folder: Path, names: list[str]) -> list[str]:
    """What the report says of the parts so far, and the end of what each printed."""
    lines = comparisons(folder)
    if all((folder / name).is_file() for name in VARIANTS):
        lines += ["", *compared({name: torch.load(folder / name, weights_only=True) for name in VARIANTS})]
    for name in names:
        if (file := folder / f"{name}.txt").is_file():
            lines += [f"\n## {name}\n", "```", file.read_text(errors="replace")[-LAST:].strip(), "```"]
    return lines


def comparisons(folder: Path) -> list[str]:
    """The table of all items that were compared."""
    lines = ["| item, batch | ms here | there | ratio | target ms | MiB here | there |", "|---" * 7 + "|"]
    for file in sorted(folder.glob("table*.json"), key=lambda file: file.stat().st_mtime):
        lines += map(comparison, json.loads(file.read_text())["results"])
    return lines


def comparison(found: dict[str, Any]) -> str:
    model, item, batch = found["model"], found["item"], found["batch_size"]
    here, there = (1000 * found[name] for name in ("seconds", "seconds_there"))
    memory = " | ".join(f"{found[name] / 2**20:,.0f}" for name in ("peak_memory", "peak_memory_there"))
    target = TARGETS.get((model, item, batch), "-")
    return f"| {model} {item}, {batch} | {here:.2f} | {there:.2f} | {found['ratio']:.2f} | {target} | {memory} |"


def setting_of(arguments: argparse.Namespace) -> Setting:
    device = pick_device(arguments.device)
    compiled = pays_to_compile(None if arguments.variant == OURS else False, device, LONG_WORK)
    size = arguments.batch_size
    return Setting(arguments.model or "S", device, arguments.precision, size, lengths=[256], compile=compiled)


def name_of(device: str) -> str:
    chosen = pick_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type


if __name__ == "__main__":
    run(main)
