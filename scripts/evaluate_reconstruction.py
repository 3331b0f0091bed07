"""Score reconstructions against their originals: fidelity, perceptual and Frechet distances, codebook, bits per pixel.

From a tokenizer:
  python3 scripts/evaluate_reconstruction.py --config configs/fashion/eval.yaml --lengths 1,2,4,8,16,32 \\
      --features efficientnet_lite0

From two sets of images, each an array (.npy, .npz) or a folder, in the same order:
  python3 scripts/evaluate_reconstruction.py --original DIR/original/images.npy --target DIR/images.npy

On several GPUs or processes: torchrun --nproc_per_node N scripts/evaluate_reconstruction.py ...
"""

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import math
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from modeling.networks.judges import Judges
from modeling.tokenizers import default_lengths, load_tokenizer, reconstruct
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_arguments, add_beside_argument, add_tokenizer_arguments, tokenizer_facts
from utils.evaluation.comparison import Comparison
from utils.evaluation.metrics import to_uint8
from utils.evaluation.report import Row, plot_curves, read_beside, tokens_text
from utils.evaluation.session import Session
from utils.evaluation.statistics import CodeCounts
from utils.inference import add_speed_arguments, choose_batch_size, parse_lengths, prepared


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_tokenizer_arguments(parser, required=False)
    parser.add_argument("--lengths", help="token counts, such as 1,2,4,8 (default: the doublings up to all tokens)")
    parser.add_argument("--original", help="images to compare with: .npy, .npz or a folder, in place of --config")
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
        shown = rows + read_beside(arguments.beside, results["protocol"]["originals"]["sha256"])
        curves = {"curves.png": lambda path: plot_curves(path, shown, seen)} if len(rows) > 1 else {}
        session.report(f"{seen} scored", results, shown, notes=notes, figures=curves)


def score_tokenizer(arguments: argparse.Namespace, session: Session) -> tuple[dict, list[str]]:
    """A tokenizer's images at each length against the originals: the results, and what to say beneath the table."""
    from data.batches import check_count
    from data.evaluation_images import evaluation_images  # torchvision is slow to import, too slow for --help

    config = load_config(arguments.config, arguments.overrides)
    num_tokens = OmegaConf.select(config, "model.vq_model.num_latent_tokens")
    lengths = parse_lengths(arguments.lengths, num_tokens) if arguments.lengths else None  # before the work
    judges = Judges(arguments.features, arguments.weights, arguments.perceptual, session.processes)
    model, located = load_tokenizer(config, arguments.checkpoint, device=session.device)
    lengths, size = lengths or default_lengths(model), model.image_size
    comparison = judges.comparison(size)
    counts = CodeCounts(model.num_latent_tokens, model.codebook_size)
    arithmetic = prepared(arguments, model)

    def score(comparison: Comparison, pixels: Tensor, keys: list[str]) -> Tensor:
        """Add images (B, 3, P, P) uint8 and what their tokens give back to the comparison; the tokens, (B, N)."""
        codes, decoded = reconstruct(model, pixels, lengths, arithmetic)
        comparison.update(pixels, {tokens_text(length): to_uint8(images) for length, images in decoded}, keys)
        return codes

    def try_batch(num: int) -> None:
        pixels = torch.zeros(num, 3, size, size, dtype=torch.uint8, device=session.device)
        score(judges.comparison(size), pixels, list(map(str, range(num))))

    asked = arguments.batch_size or config.training.per_gpu_batch_size
    batch_size = choose_batch_size(asked, try_batch, session.device)
    batches = evaluation_images(config, arguments.num_images, **session.share(batch_size))
    for batch in session.each(batches):
        counts.update(score(comparison, batch["image"].to(session.device), batch["__key__"]))

    bits = math.log2(model.codebook_size)
    record = session.record(
        originals=session.counted(comparison, check_count, batches.expected, batches.num_bad),
        preparation=batches.preparation,
        **tokenizer_facts(arguments, located.name, located.weights),
        lengths=lengths,
        batch_size=batch_size,
        bits_per_token=bits,
        seed="none is used: nothing in it is random",
        **judges.record(),
    )
    scores = comparison.finish([tokens_text(length) for length in lengths])
    rows = [token_row(length, bits, size, located.name) | scores[tokens_text(length)] for length in lengths]
    codebook = counts.finish(session.processes)
    used, perplexity, entropy = (codebook[name] for name in ("usage", "perplexity", "entropy_bits"))
    note = f"codes used {used:.1%}, perplexity {perplexity:.1f}, entropy {entropy:.2f} of {bits:.0f} bits"
    return {"rows": rows, "codebook": codebook, "protocol": record}, [note]


def token_row(length: int, bits: float, image_size: int, system: str) -> Row:
    """What a row says of images of `length` tokens of `bits` each, before their scores."""
    return {
        "name": tokens_text(length),
        "system": system,
        "tokens": length,
        "bytes_per_image": math.ceil(length * bits / 8),
        "bits_per_pixel": length * bits / image_size**2,
    }


def score_images(arguments: argparse.Namespace, session: Session) -> tuple[dict, list[str]]:
    """One set of images against another, as they are."""
    from data.batches import check_count
    from data.evaluation_images import first_of
    from data.image_sets import AS_GIVEN, open_images, paired

    judges = Judges(arguments.features, arguments.weights, arguments.perceptual, session.processes)
    sets = paired([open_images(arguments.original), open_images(arguments.target)])
    originals, targets = (first_of(images, arguments.num_images) for images in sets)
    height, width, device = originals.height, originals.width, session.device
    comparison = judges.comparison(min(height, width))
    name = Path(arguments.target).stem

    def try_batch(num: int) -> None:
        pixels = torch.zeros(num, 3, height, width, dtype=torch.uint8, device=device)
        judges.comparison(min(height, width)).update(pixels, {name: pixels}, list(map(str, range(num))))

    batch_size = choose_batch_size(arguments.batch_size or 64, try_batch, device, most=len(originals))
    share = session.share(batch_size)
    pairs = zip(originals.batches(**share), targets.batches(**share), strict=True)
    with session.progress(len(originals)) as done:
        for (keys, original), (_, target) in pairs:
            comparison.update(original.to(device), {name: target.to(device)}, keys)
            done(len(keys))
    record = session.record(
        originals=session.counted(comparison, check_count, len(originals)),
        preparation=AS_GIVEN,
        original=arguments.original,
        target=arguments.target,
        **judges.record(),
    )
    row = {"name": name, "system": name, **comparison.finish([name])[name]}
    return {"rows": [row], "protocol": record}, []


if __name__ == "__main__":
    run(main)
