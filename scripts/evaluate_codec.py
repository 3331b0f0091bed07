"""Measure rate control and effort of a tokenizer's compressed files: quality against bytes, choice by choice.

    python3 scripts/evaluate_codec.py --config configs/fashion/eval.yaml --checkpoint one-d-piece_fashion
    python3 scripts/evaluate_codec.py --config configs/fashion/eval.yaml --checkpoint one-d-piece_fashion \\
        --efforts 0 1 2 3 --num_images 200

Every prefix of every image is written and decoded once. Then lengths are chosen: one for all images, what a PSNR that
is asked for needs (also guessed, as --fast does), and a budget spread over all images; budgets that nothing fits into
are named and left out. Bytes are those of the payload; a file has a header of 8 more. Seconds are of one thread.
metrics.json has all rows, curves.png is drawn from them. A run that was killed goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils.config import load_config
from utils.evaluation.arguments import add_common_arguments, add_num_images_argument, add_tokenizer_arguments
from utils.evaluation.comparison import Originals
from utils.evaluation.report import plot_curves
from utils.evaluation.session import Session
from utils.parts import SOURCE, Parts

if TYPE_CHECKING:
    from codec.evaluation import Results


def main() -> None:
    arguments = parse_arguments()
    from codec.files import load_codec  # slow to import, too slow for --help
    from data.evaluation_images import NumberedImages, choose
    from modeling.checkpoints.state import fingerprint

    config = load_config(arguments.config, arguments.overrides)
    with Session(arguments.device, arguments.output_dir) as session:
        codec = load_codec(config, arguments.checkpoint, session.device)
        images = NumberedImages(config, codec.side, session.processes)
        numbers = choose(len(images), images.most(arguments.num_images), config.training.seed)
        plan = {
            "tokenizer": codec.identity.hex(),
            "weights": fingerprint(codec.tokenizer.state_dict()),  # an identity knows nothing of the decoder
            "entropy_model": codec.models.best().identity.hex(),
            "image_names": images.names,
            SOURCE: images.source,
            "preparation": images.preparation,
            "images": numbers.tolist(),
            "efforts": arguments.efforts,
            "psnr_only": arguments.psnr_only,
            "batch_size": arguments.batch_size or config.training.per_gpu_batch_size,
        }
        results = measured_results(arguments, session, codec, images, numbers, plan)
        facts = {"originals": originals_of(session, images, numbers, plan["batch_size"]), **codec.record(), **plan}
        if results:
            report(arguments, session, codec, results, facts | {"images": len(numbers)})


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_tokenizer_arguments(parser, required=True)
    parser.add_argument(
        "--efforts", type=int, nargs="+", default=[0], choices=range(4), help="to compare (default: the plain encoder)"
    )
    parser.add_argument("--psnr", type=float, default=19.0, metavar="DB", help="that is asked for (default: 19)")
    parser.add_argument("--least", type=float, default=18.0, metavar="DB", help="that most are to have (default: 18)")
    parser.add_argument("--budget", type=float, default=10.0, metavar="BYTES", help="an image (default: 10)")
    parser.add_argument("--psnr_only", action="store_true", help="no SSIM and perceptual distance: a fifth less work")
    add_num_images_argument(parser, "N images, drawn by training.seed of the configuration")
    add_common_arguments(parser, "output/evaluate_codec")
    return parser.parse_args()


def measured_results(
    arguments: argparse.Namespace, session: Session, codec: Any, images: Any, numbers: np.ndarray, plan: dict[str, Any]
) -> "list[Results]":
    """Those of each effort, on the main process."""
    from codec.evaluation import Prefixes, Results, measured
    from codec.rate import tried_lengths

    size = plan["batch_size"]
    chunks = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    jobs = [(effort, chunk) for effort in arguments.efforts for chunk in chunks]
    parts = Parts(session.output_dir, plan, len(jobs), session.processes)
    todo = list(parts.mine())
    looks_closely = not arguments.psnr_only
    with session.progress(sum(len(jobs[index][1]) for index in todo) * session.processes.world_size) as done:
        for index in todo:
            effort, chunk = jobs[index]
            batches = images.batches(chunk, size)
            prefixes = Prefixes.joined([measured(codec, pixels, effort, looks_closely) for _, pixels in batches])
            parts.write(index, **vars(prefixes))
            done(len(chunk))
    session.processes.wait()
    if not session.processes.is_main:
        return []
    found = [Prefixes(**part) for part in parts.read()]
    lengths = np.array(tried_lengths(codec.tokenizer))
    each = [found[first : first + len(chunks)] for first in range(0, len(found), len(chunks))]
    return [
        Results(Prefixes.joined(some), lengths, effort) for some, effort in zip(each, arguments.efforts, strict=True)
    ]


def originals_of(session: Session, images: Any, numbers: np.ndarray, batch_size: int) -> dict[str, Any]:
    """For the protocol: the images, read again, as an earlier run may have measured some of them."""
    originals = Originals(session.processes)
    mine = numbers[session.processes.rank :: session.processes.world_size]
    with session.progress(len(numbers), "originals") as done:
        for keys, pixels in images.batches(mine, batch_size):
            originals.add(pixels, keys)
            done(len(keys))
    num_skipped = len(mine) - len(originals.keys)
    return originals.record(len(numbers), session.sum(num_skipped))


def report(
    arguments: argparse.Namespace, session: Session, codec: Any, results: "list[Results]", facts: dict[str, Any]
) -> None:
    """Let the goals choose among the prefixes, and say what that comes to.

    Args:
        facts: For the protocol; `images` is their number.
    """
    from codec.evaluation import BUDGETS, TARGETS, gains

    rows, asked = [], []
    for one in results:
        rows += one.of_lengths()
        rows += [one.of_psnr(target) for target in TARGETS]
        rows += [one.of_budget(size) for size in BUDGETS if one.fits(size)]
        asked += [one.of_psnr(arguments.psnr), one.of_psnr(arguments.psnr, fewest="tokens")]
        asked += [one.of_psnr(arguments.least)]
        asked += [one.of_budget(size) for size in [arguments.budget] if one.fits(size)]
        if codec.has_predictor:
            asked += [one.of_guesses(target, codec.predictor) for target in (arguments.psnr, arguments.least)]
    plain = results[0]
    beside = [plain.at_equal_bytes(row["bytes_per_image"]) for row in asked]
    efforts = {one.effort: {"seconds": float(one.prefixes.seconds.mean()), **gains(one, plain)} for one in results}
    record = session.record(config=arguments.config, overrides=arguments.overrides, **facts)
    told = {"rows": rows, "asked": asked, "one_length_at_equal_bytes": beside, "efforts": efforts, "protocol": record}
    notes = [*map(comparison, asked, beside), *(gain_of(effort, gain, plain) for effort, gain in efforts.items())]
    notes += [skipped_of(one, sorted({*BUDGETS, arguments.budget})) for one in results]
    seen = f"{facts['images']:,} images"
    session.report(
        f"{seen} measured",
        told,
        rows,
        notes=list(filter(None, notes)),
        figures={"curves.png": lambda path: plot_curves(path, rows, seen)},
    )


def comparison(row: dict[str, Any], one_length: dict[str, float]) -> str:
    """A choice, beside one length for all at equal bytes."""
    facts = [f"{row['name']}: {row['bytes_per_image']:.2f} bytes"]
    for name in ("psnr", "psnr_deviation", "psnr_5th_percentile"):
        facts.append(f"{name} {row[name]:.2f} (one length: {one_length[name]:.2f})")
    facts += [
        f"{name} {row[name]:.4g}" for name in ("reached", "decodes", "more_bytes", "unspent_bytes") if name in row
    ]
    return ", ".join(facts)


def skipped_of(results: "Results", budgets: Sequence[float]) -> str:
    """The budgets that are too small for any file; empty where there are none."""
    skipped = [f"{size:g}" for size in budgets if not results.fits(size)]
    if not skipped:
        return ""
    least = results.sizes.min(axis=1).mean()
    return f"effort {results.effort}: images take {least:.2f} bytes at least, so no budget of {', '.join(skipped)}"


def gain_of(effort: int, gain: dict[str, Any], plain: "Results") -> str:
    """What an effort costs, and what it gains on the first of those that are compared."""
    seconds = f"{gain['seconds']:.2f} s an image"
    if effort == plain.effort:
        return f"effort {effort}: {seconds}"
    places = [int(np.flatnonzero(plain.lengths == length)[0]) for length in (8, 32) if length in plain.lengths]
    facts = [seconds]
    for place in places:
        at_bytes = gain["at_equal_bytes"][place]
        beside = f"more bytes than effort {plain.effort}" if at_bytes is None else f"{at_bytes:+.2f} at equal bytes"
        facts.append(f"{gain['at_equal_tokens'][place]:+.2f} dB at {plain.lengths[place]} tokens ({beside})")
    facts.append(f"{gain['at_most_bytes']:+.2f} at the most bytes that both have")
    facts.append(f"least gain {min(gain['at_equal_tokens']):+.2f} dB")
    return f"effort {effort} beside effort {plain.effort}: {', '.join(facts)}"


if __name__ == "__main__":
    run(main)
