"""Score JPEG, JPEG 2000, WebP, AVIF and our own files at given bytes per image, as a tokenizer's images are scored.

  python3 scripts/evaluate_image_formats.py --config configs/fashion/eval.yaml --features efficientnet_lite0 \\
      --beside output/evaluate_reconstruction/metrics.json
  python3 scripts/evaluate_image_formats.py --codec one-d-piece_fashion --formats jpeg webp thumbhash blurhash \\
      --budgets 16,20,24,32,48 --num_images 200

Of each image and for each budget the best file (least squared error) that fits is taken: plainly, and after scaling
the image down first, which is the fair way where headers take most of the budget. Bytes are those of whole files,
headers included; the bytes of the headers are stated apart, and --free_headers adds a variant that does not count them.
Grey images are stored as grey; JPEG 2000 as the bare codestream. --codec adds compressed files of a tokenizer (.1dp).
A budget that does not hold every image has no scores. Beside metrics.json go images.csv, the file of every image, and
bench_SYSTEM.json, which CompressAI's plots read. On several processes:
torchrun --nproc_per_node N scripts/evaluate_image_formats.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from modeling.networks.judges import Judges
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_arguments, add_beside_argument, add_overrides
from utils.evaluation.format_budgets import (
    FormatScores,
    bench,
    best_files,
    by_image,
    bytes_at_psnr,
    default_budgets,
    describe,
    entries_of,
    lines_at_psnr,
    parse_budgets,
    parse_levels,
    record_of,
    without_repeats,
    write_images,
)
from utils.evaluation.image_formats import FORMATS, Format, available
from utils.evaluation.placeholders import PLACEHOLDERS, placeholder
from utils.evaluation.report import plot_curves, read_beside
from utils.evaluation.session import RESULTS, Session
from utils.files import write_json

IMAGES = "images.csv"  # a line for each file


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", default="configs/fashion/eval.yaml", help="of the images (default: %(default)s)")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=[*FORMATS, *PLACEHOLDERS],
        default=list(FORMATS),
        help="default: all but the placeholders thumbhash and blurhash, whose packages pyproject.toml names",
    )
    parser.add_argument("--codec", metavar="TOKENIZER", help="also its compressed files: bundled name, folder, hub id")
    parser.add_argument(
        "--effort",
        type=int,
        nargs="+",
        default=[0],
        metavar="0..3",
        help="of --codec, one or more (default: 0)",
    )
    parser.add_argument("--fit", choices=("crop", "tile"), default="crop", help="of --codec (default: %(default)s)")
    parser.add_argument("--psnr", metavar="DB", help="such as 18,20: say how many bytes each takes for it on average")
    parser.add_argument(
        "--budgets",
        help="bytes, such as 40,80,160 (default: those of the config's tokenizer, up to 16 times more)",
    )
    parser.add_argument("--free_headers", action="store_true", help="also spend the budgets on what is not header")
    add_beside_argument(parser)
    add_arguments(parser, output_dir="output/evaluate_image_formats", features="efficientnet_lite0")
    add_overrides(parser)
    arguments = parser.parse_args()
    arguments.psnr = parse_levels(arguments.psnr) if arguments.psnr else []
    if not arguments.codec and (arguments.effort != [0] or arguments.fit != "crop"):
        raise UserError("--effort and --fit go with --codec, whose files they are about")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    config = load_config(arguments.config, arguments.overrides)
    budgets = parse_budgets(arguments.budgets) if arguments.budgets else budgets_of(config)
    formats = {name: placeholder(name) if name in PLACEHOLDERS else available(name) for name in arguments.formats}
    with Session(arguments.device, arguments.output_dir, (*RESULTS, IMAGES)) as session:
        facts = {}
        if arguments.codec:
            from codec.files import FITS, load_codec  # slow to import, too slow for --help
            from codec.image_format import as_format

            codec, side = load_codec(None, arguments.codec, session.device), config.dataset.preprocessing.crop_size
            for effort in arguments.effort:
                formats[f"1dp_{effort}"] = as_format(codec, budgets, side, effort=effort, fit=FITS[arguments.fit])
            facts["codec"] = codec.record() | {"efforts": arguments.effort, "fit": arguments.fit}
        evaluate(arguments, config, formats, budgets, session, facts)


def budgets_of(config: DictConfig) -> list[int]:
    vq_model = OmegaConf.select(config, "model.vq_model")
    if vq_model is None:
        raise UserError("--config has no tokenizer (model.vq_model) whose bytes could be the budgets: give --budgets")
    return default_budgets(vq_model.num_latent_tokens, vq_model.codebook_size)


def evaluate(
    arguments: argparse.Namespace,
    config: DictConfig,
    formats: dict[str, Format],
    budgets: list[int],
    session: Session,
    facts: dict[str, Any],
) -> None:
    """Score the formats and report.

    Args:
        facts: Further ones for the protocol.
    """
    from data.batches import check_count
    from data.evaluation_images import evaluation_images  # torchvision is slow to import, too slow for --help

    size = config.dataset.preprocessing.crop_size
    entries = entries_of(list(formats.values()), budgets, arguments.free_headers)
    judges = Judges(arguments.features, arguments.weights, arguments.perceptual, session.processes)
    comparison = judges.comparison(size)
    scores = FormatScores(entries, comparison, session.processes)
    batches = evaluation_images(config, arguments.num_images, **session.share(arguments.batch_size))
    with session.progress(batches.expected) as done:
        for batch in batches:
            files = []
            for pixels in batch["image"].permute(0, 2, 3, 1).contiguous().numpy():
                files.append(best_files(pixels, entries))
                done(1)
            scores.update(batch["image"], files, batch["__key__"])

    record = session.record(
        originals=session.counted(comparison, check_count, batches.expected, batches.num_bad),
        preparation=batches.preparation,
        config=arguments.config,
        overrides=arguments.overrides,
        **record_of(formats, size),
        **facts,
        **judges.record(),
    )
    rows = scores.rows(size)
    shown = without_repeats(rows)
    for line in describe(list(formats.values()), rows, size):
        session.say(line)
    seen = f"{record['originals']['seen']:,} images"
    files = by_image(session.processes.gather(scores.files))
    written = {IMAGES: lambda path: write_images(path, files)}
    for name, system in bench(rows, files).items():
        written[name] = partial(write_json, value=system)
    notes = lines_at_psnr(bytes_at_psnr(rows, arguments.psnr))
    earlier = [path.name for path in session.output_dir.glob("bench_*.json")]
    results = {"rows": rows, "protocol": record}
    try:
        shown = read_beside(arguments.beside, record["originals"]["sha256"]) + shown
    finally:  # results that may have taken hours are written even where others do not fit beside them
        if shown:
            written["curves.png"] = lambda path: plot_curves(path, shown, seen)
        session.report(f"{seen} scored", results, shown, notes=notes, figures=written, earlier=earlier)


if __name__ == "__main__":
    run(main)
