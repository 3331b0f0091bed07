"""Score reconstructions against their originals: fidelity, perceptual and Frechet distances, codebook, bits per pixel.

From a tokenizer:
  python3 scripts/evaluate_reconstruction.py --config configs/fashion/eval.yaml --lengths 1,2,4,8,16,32 \\
      --features efficientnet_lite0

From two sets of images, each an array (.npy, .npz) or a folder, in the same order:
  python3 scripts/evaluate_reconstruction.py --original DIR/original/images.npy --target DIR/images.npy

On several GPUs or processes: torchrun --nproc_per_node N scripts/evaluate_reconstruction.py ...
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modeling.networks.judges import Networks
from modeling.tokenizers import default_lengths, load_tokenizer
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import add_arguments, add_beside_argument, parse_lengths
from utils.evaluation.comparison import Comparison
from utils.evaluation.metrics import to_uint8
from utils.evaluation.protocol import exact_arithmetic, protocol
from utils.evaluation.report import Row, plot_curves, read_results, table, write_results
from utils.evaluation.statistics import add_up, code_statistics
from utils.files import sha256_of
from utils.inference import add_speed_arguments, choose_batch_size, prepared
from utils.processes import Processes


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="configuration of the tokenizer and of the evaluation images")
    parser.add_argument("--checkpoint", help="hub id, folder, training output, file, or step (default: the config's)")
    parser.add_argument("--lengths", help="token counts, such as 1,2,4,8 (default: the doublings up to all tokens)")
    parser.add_argument("--original", help="images to compare with: .npy, .npz or a folder, in place of --config")
    parser.add_argument("--target", help="images to score: .npy, .npz or a folder")
    add_beside_argument(parser)
    add_arguments(parser, output_dir="output/evaluate_reconstruction", auto_batch_size=True)
    add_speed_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
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
    exact_arithmetic()
    processes = Processes(arguments.device)
    try:
        score = score_images if arguments.config is None else score_tokenizer
        score(arguments, processes)
    finally:
        processes.close()


def score_tokenizer(arguments: argparse.Namespace, processes: Processes) -> None:
    from data.image_shards import check_count, evaluation_loader  # torchvision is slow to import, too slow for --help
    from data.transforms import EvalTransform

    config = load_config(arguments.config, arguments.overrides)
    networks = Networks(arguments, processes)
    model, located = load_tokenizer(config, arguments.checkpoint, device=processes.device)
    arithmetic = prepared(arguments, model)
    lengths = parse_lengths(arguments.lengths) if arguments.lengths else default_lengths(model)
    names = {length: f"{length} token{'s' if length > 1 else ''}" for length in lengths}
    comparison = networks.comparison(model.image_size)
    counts = torch.zeros(model.num_latent_tokens, model.codebook_size, dtype=torch.long)
    positions = torch.arange(model.num_latent_tokens)

    @torch.no_grad()
    def score(comparison: Comparison, pixels: Tensor, keys: list[str]) -> Tensor:
        """Add images (B, 3, P, P) uint8 to the comparison; their tokens, (B, N)."""
        z_quantized, result = model.encode(pixels.float() / 255)
        with arithmetic():
            versions = {name: to_uint8(model.decode(z_quantized, length=length)) for length, name in names.items()}
        comparison.update(pixels, versions, keys)
        return result["min_encoding_indices"][:, 0].cpu()

    def try_batch(num: int) -> None:
        pixels = torch.zeros(num, 3, model.image_size, model.image_size, dtype=torch.uint8, device=processes.device)
        score(networks.comparison(model.image_size), pixels, [str(number) for number in range(num)])

    batch_size = arguments.batch_size or config.training.per_gpu_batch_size
    batch_size = choose_batch_size(batch_size, try_batch, processes.device)
    batches = evaluation_loader(config, rank=processes.rank, world_size=processes.world_size, batch_size=batch_size)
    for batch in progress(batches, batches.expected, processes):
        codes = score(comparison, batch["image"].to(processes.device), batch["__key__"])
        counts.index_put_((positions.expand_as(codes), codes), torch.ones(()).long(), accumulate=True)

    num_bad = int(add_up(torch.tensor(batches.num_bad), processes))
    check_count(comparison.count(), batches.expected, num_bad)
    scores = comparison.finish(list(names.values()))
    bits_per_token = math.log2(model.codebook_size)
    rows: list[Row] = [
        {
            "name": name,
            "system": located.name,
            "tokens": length,
            "bytes_per_image": math.ceil(length * bits_per_token / 8),
            "bits_per_pixel": length * bits_per_token / model.image_size**2,
            **scores[name],
        }
        for length, name in names.items()
    ]
    codebook = code_statistics(add_up(counts, processes))
    record = protocol(
        processes,
        originals=comparison.record(batches.expected, num_bad),
        preparation=EvalTransform(model.image_size).description,
        config=arguments.config,
        overrides=arguments.overrides,
        checkpoint=located.name,
        checkpoint_sha256=sha256_of(located.weights),
        lengths=lengths,
        tokenizer_precision=arguments.precision,
        compiled=arguments.compile,
        batch_size=batch_size,
        bits_per_token=bits_per_token,
        seed="none is used: nothing in it is random",
        **networks.record(),
    )
    report(arguments, processes, rows, record, codebook)


def score_images(arguments: argparse.Namespace, processes: Processes) -> None:
    from data.image_sets import open_images
    from data.image_shards import check_count

    networks = Networks(arguments, processes)
    originals, targets = open_images(arguments.original), open_images(arguments.target)
    originals.check_pairs(targets)
    comparison = networks.comparison(min(originals.height, originals.width))
    name = Path(arguments.target).stem

    def try_batch(num: int) -> None:
        pixels = torch.zeros(num, 3, originals.height, originals.width, dtype=torch.uint8, device=processes.device)
        keys = [str(number) for number in range(num)]
        networks.comparison(min(originals.height, originals.width)).update(pixels, {name: pixels}, keys)

    batch_size = choose_batch_size(arguments.batch_size or 64, try_batch, processes.device, most=len(originals))
    share = {"batch_size": batch_size, "rank": processes.rank, "world_size": processes.world_size}
    pairs = zip(originals.batches(**share), targets.batches(**share), strict=True)
    with tqdm(total=len(originals), unit="image", disable=not processes.is_main, dynamic_ncols=True) as bar:
        for (keys, original), (_, target) in pairs:
            comparison.update(original.to(processes.device), {name: target.to(processes.device)}, keys)
            bar.update(len(keys) * processes.world_size)
    check_count(comparison.count(), len(originals))
    rows = [{"name": name, "system": name, **comparison.finish([name])[name]}]
    record = protocol(
        processes,
        originals=comparison.record(len(originals)),
        preparation="images as they are given",
        original=arguments.original,
        target=arguments.target,
        **networks.record(),
    )
    report(arguments, processes, rows, record)


def progress(batches, expected: int | None, processes: Processes):
    """The batches, with a bar over the images of all processes as far as this one can tell."""
    with tqdm(total=expected, unit="image", disable=not processes.is_main, dynamic_ncols=True) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch["__key__"]) * processes.world_size)


def report(
    arguments: argparse.Namespace,
    processes: Processes,
    rows: list[Row],
    record: dict[str, Any],
    codebook: dict[str, Any] | None = None,
) -> None:
    """Print the table, write metrics.json and, where there are several lengths, the curves."""
    if not processes.is_main:
        return
    output_dir = Path(arguments.output_dir)
    beside = [row for path in arguments.beside for row in read_results(path, record["originals"]["sha256"])]
    print(table(rows + beside))
    if codebook is not None:
        print(
            f"codes used {codebook['usage']:.1%}, perplexity {codebook['perplexity']:.1f}, "
            f"entropy {codebook['entropy_bits']:.2f} of {record['bits_per_token']:.0f} bits"
        )
    results = {"rows": rows, **({"codebook": codebook} if codebook is not None else {}), "protocol": record}
    write_results(output_dir / "metrics.json", results)
    written = [output_dir / "metrics.json"]
    if len(rows) > 1:
        plot_curves(output_dir / "curves.png", rows + beside, f"{record['originals']['seen']:,} images")
        written.append(output_dir / "curves.png")
    print(f"{record['originals']['seen']:,} images scored; wrote {' and '.join(map(str, written))}")


if __name__ == "__main__":
    run(main)
