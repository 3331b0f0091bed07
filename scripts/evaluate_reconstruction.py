"""Score reconstructions against their originals: fidelity, perceptual and Frechet distances, codebook, bits per pixel.

From a tokenizer, or a teacher by its configuration:
  python3 scripts/evaluate_reconstruction.py --config configs/fashion/eval.yaml --lengths 1,2,4,8,16,32 \\
      --features efficientnet_lite0

From two sets of images: arrays (.npy, .npz), paired by order, or folders, paired by file name:
  python3 scripts/evaluate_reconstruction.py --original DIR/original/images.npy --target DIR/images.npy

On several GPUs or processes: torchrun --nproc_per_node N scripts/evaluate_reconstruction.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse

from omegaconf import OmegaConf

from modeling.networks.judges import Judges
from modeling.reconstruction_scores import ReconstructionScores, load_scored
from modeling.tokenizers import default_lengths
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_arguments, add_beside_argument, add_tokenizer_arguments, tokenizer_facts
from utils.evaluation.report import plot_curves, read_beside
from utils.evaluation.session import Session
from utils.inference import add_speed_arguments, choose_batch_size, parse_lengths, prepared


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_tokenizer_arguments(parser, required=False)
    parser.add_argument("--lengths", help="token counts, such as 1,2,4,8 (default: the doublings up to all tokens)")
    parser.add_argument("--original", help="images to compare with: .npy, .npz or a folder, instead of --config")
    parser.add_argument("--target", help="images to score: .npy, .npz or a folder")
    add_beside_argument(parser)
    add_arguments(parser, output_dir="output/evaluate_reconstruction", auto_batch_size=True)
    add_speed_arguments(parser)
    arguments = parser.parse_args()
    if arguments.config is not None and (arguments.original or arguments.target):
        raise UserError("give either --config, or --original and --target, not both")
    if arguments.config is None and not (arguments.original and arguments.target):
        raise UserError("give --config CONFIG (a tokenizer is scored), or --original A --target B (images are)")
    if arguments.config is None and (arguments.checkpoint or arguments.lengths or arguments.overrides):
        raise UserError("--checkpoint, --lengths and a.b=c go with --config")
    if arguments.config is None and (arguments.compile or arguments.precision != "fp32"):
        raise UserError("--precision and --compile are for a tokenizer: they go with --config")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    with Session(arguments.device, arguments.output_dir) as session:
        score = score_images if arguments.config is None else score_tokenizer
        results, notes = score(arguments, session)
        rows, seen = results["rows"], f"{results['protocol']['originals']['seen']:,} images"
        shown = list(rows)
        try:
            shown += read_beside(arguments.beside, results["protocol"]["originals"]["sha256"])
        finally:  # results that may have taken hours are written even where others do not fit beside them
            curves = {"curves.png": lambda path: plot_curves(path, shown, seen)} if len(rows) > 1 else {}
            session.report(f"{seen} scored", results, shown, notes=notes, figures=curves)


def score_tokenizer(arguments: argparse.Namespace, session: Session) -> tuple[dict, list[str]]:
    """A tokenizer's images at each length against the originals: the results, and what to say beneath the table."""
    from data.evaluation_images import evaluation_images, record_of  # torchvision is slow, too slow for --help

    config = load_config(arguments.config, arguments.overrides)
    num_tokens = OmegaConf.select(config, "model.vq_model.num_latent_tokens")
    lengths = parse_lengths(arguments.lengths, num_tokens) if arguments.lengths else None  # before the work
    judges = Judges(arguments.features, arguments.weights, arguments.perceptual, session.processes)
    model, located = load_scored(config, arguments.checkpoint, session.device)
    session.say(f"scoring {located.name}")
    scores = ReconstructionScores(model, lengths or default_lengths(model), prepared(arguments, model), judges)
    asked = arguments.batch_size or config.training.per_gpu_batch_size
    batch_size = choose_batch_size(asked, scores.try_batch, session.device)
    batches = evaluation_images(config, arguments.num_images, **session.share(batch_size))
    for batch in session.each(batches):
        scores.update(batch["image"].to(session.device), batch["__key__"])
    record = session.record(
        **record_of(batches, scores.comparison, session),
        **tokenizer_facts(arguments, located.name, located.weights),
        lengths=scores.lengths,
        batch_size=batch_size,
        bits_per_token=scores.bits,
        seed="none is used: nothing in it is random",
        **judges.record(),
    )
    results, note = scores.finish(located.name)
    return {**results, "protocol": record}, [note]


def score_images(arguments: argparse.Namespace, session: Session) -> tuple[dict, list[str]]:
    """One set of images against another, as they are."""
    from data.scored_sets import score_pair

    judges = Judges(arguments.features, arguments.weights, arguments.perceptual, session.processes)
    how = {"num_images": arguments.num_images, "batch_size": arguments.batch_size}
    row, facts = score_pair(arguments.original, arguments.target, judges.comparison, session, **how)
    return {"rows": [row], "protocol": session.record(**facts, **judges.record())}, []


if __name__ == "__main__":
    run(main)
