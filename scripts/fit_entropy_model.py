"""Fit what a tokenizer's compressed files need: the entropy model to a token set, the length predictor to images.

    python3 scripts/pretokenize.py --config configs/fashion/generator.yaml --output_dir fashion_mnist_tokens
    python3 scripts/fit_entropy_model.py --token_set fashion_mnist_tokens --tokenizer checkpoints/fashion_stage2 \\
        --images configs/fashion/generator.yaml

The network is trained in floats (configs/entropy.yaml; arguments a.b=c change it), rounded to integers of 8
bits, and stored with the tables as entropy.safetensors, in the tokenizer's folder or as --output. Then the tokens of
the evaluation split are written and read back with what was stored. The bits of each position and the bytes of each
length are printed and, with a figure, written into --output_dir. A run that was killed goes on where it was: an
--output_dir is of one tokenizer and token set.

With --images a predictor of the PSNR at each length, which --fast of scripts/compress.py starts from, is fitted to
some training images of a configuration, and stored as length.safetensors beside the entropy model. Without --token_set
it is all that is fitted.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from utils.config import load_config
from utils.errors import UserError
from utils.figures import plotting, write_figure
from utils.files import write_json
from utils.inference import parse_batch_size
from utils.paths import ROOT

if TYPE_CHECKING:
    from torch import Tensor

    from codec.entropy import EntropyModels
    from modeling.titok import TiTok

CONFIG = ROOT / "configs/entropy.yaml"
NUM_TIMED = 100


def main() -> None:
    arguments = parse_arguments()
    # Slow to import, too slow for --help.
    from codec.entropy import FILE
    from codec.length import FILE as LENGTH_FILE
    from modeling.checkpoints.locate import locate
    from modeling.tokenizers import frozen_tokenizer

    entropy = arguments.output or locate(arguments.tokenizer).weights.parent / FILE
    lengths = entropy.with_name(LENGTH_FILE)
    fitted = [path for path, given in ((entropy, arguments.token_set), (lengths, arguments.images)) if given]
    if not fitted:
        raise UserError("nothing to fit to: give --token_set for the entropy model, --images for the length predictor")
    for path in fitted:
        if path.exists() and not arguments.force:
            raise UserError(f"{path} is there already: give --force to replace it, or another place as --output")
    tokenizer = frozen_tokenizer(arguments.tokenizer)
    if arguments.images:
        fit_lengths(arguments, tokenizer, lengths)
    if arguments.token_set:
        fit_entropy(arguments, tokenizer, entropy)


def fit_lengths(arguments: argparse.Namespace, tokenizer: "TiTok", output: Path) -> None:
    from codec.fitting import training_images
    from codec.length import fit
    from modeling.identity import identity

    config = load_config(arguments.images, arguments.overrides if not arguments.token_set else [])
    if (side := config.dataset.preprocessing.crop_size) != tokenizer.image_size:
        raise UserError(
            f"{arguments.images} crops images to {side} pixels, and the tokenizer {arguments.tokenizer} takes "
            f"{tokenizer.image_size}: give a configuration of that dataset.preprocessing.crop_size as --images"
        )
    with tqdm(total=arguments.num_images, unit="image", desc="lengths", dynamic_ncols=True) as progress:

        def told(batches: Iterable["Tensor"]) -> Iterator["Tensor"]:
            for batch in batches:
                yield batch
                progress.update(len(batch))

        predictor = fit(tokenizer, told(training_images(config, arguments.num_images)))
    predictor.save(output, bytes.fromhex(identity(tokenizer)))
    print("how far a PSNR that is guessed from the encoder's output is off, on images held out")
    print(*predictor.describe(), sep="\n")
    print(f"wrote {output} ({output.stat().st_size:,} bytes)")


def fit_entropy(arguments: argparse.Namespace, tokenizer: "TiTok", output: Path) -> None:
    from codec.entropy import load_entropy_models, save_entropy_models
    from codec.fitting import fit
    from data.token_sets import TokenSet
    from modeling.identity import identity

    settings = {
        "experiment.tokenizer_checkpoint": arguments.tokenizer,
        "experiment.output_dir": arguments.output_dir / "training",
        "dataset.params.token_set": arguments.token_set,
        "model.entropy.num_tokens": tokenizer.num_latent_tokens,
        "model.entropy.codebook_size": tokenizer.codebook_size,
        "model.entropy.token_size": tokenizer.quantize.embedding.embedding_dim,
    }
    config = load_config(arguments.config, [f"{key}={value}" for key, value in settings.items()] + arguments.overrides)
    model = fit(config, tokenizer)
    save_entropy_models(output, bytes.fromhex(identity(tokenizer)), model)

    test_set = TokenSet(arguments.token_set / "eval")
    report = measured(load_entropy_models(output), test_set.tokens[:, 0].astype(np.int64))
    print_report(report)
    write_json(arguments.output_dir / "entropy.json", report)
    write_figure(draw(report), arguments.output_dir / "entropy")
    print(f"\nwrote {output} ({output.stat().st_size:,} bytes)")
    print(f"wrote entropy.json, entropy.png and entropy.pdf into {arguments.output_dir}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--token_set", type=Path, metavar="SET", help="what scripts/pretokenize.py wrote")
    parser.add_argument("--images", metavar="CONFIG", help="whose training images the length predictor is fitted to")
    parser.add_argument(
        "--num_images",
        type=parse_batch_size,
        default=1500,
        metavar="N",
        help="of --images, of every shard alike (default: 1500)",
    )
    parser.add_argument(
        "--tokenizer", required=True, help="what is fitted to: bundled name, folder, training output or hub id"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the model goes (default: beside the tokenizer)"
    )
    parser.add_argument(
        "--config", default=CONFIG, help="default: configs/entropy.yaml; for 256 tokens entropy_256.yaml"
    )
    parser.add_argument("--force", action="store_true", help="replace a model that is there")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/entropy"), help="training, figures (default: %(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
    return parser.parse_args()


def measured(models: "EntropyModels", tokens: np.ndarray) -> dict[str, Any]:
    """Of tokens (n, N), by mode: bits by position, real bytes by length, and the time to read one image.

    All tokens of an image are written and read back, and must be the same; of its prefixes the bytes are counted.
    """
    num_images, num_tokens = tokens.shape
    lengths = [2**power for power in range(num_tokens.bit_length()) if 2**power < num_tokens] + [num_tokens]
    report: dict[str, Any] = {"num_images": num_images, "lengths": lengths, "modes": {}}
    for mode, model in models.by_mode.items():
        bits, sizes = model.prefix_bits(tokens), model.prefix_bytes(tokens)
        payloads = model.encode_batch(tokens)
        decoded, _ = model.decode_batch(payloads, [num_tokens] * num_images)
        if not np.array_equal(decoded, tokens):
            raise RuntimeError(f"the tokens of {mode.name} come back as others")
        start, some = time.process_time(), payloads[:NUM_TIMED]
        for payload in some:
            model.decode(payload, num_tokens)
        over = sizes - bits / 8
        report["modes"][mode.name.lower()] = {
            "bits": np.diff(bits, axis=1, prepend=0).mean(axis=0).tolist(),
            "bytes": sizes[:, np.array(lengths) - 1].mean(axis=0).tolist(),
            "bytes_over_ideal": {"mean": float(over.mean()), "most": float(over.max())},
            "milliseconds_to_decode": 1000 * (time.process_time() - start) / len(some),
        }
    return report


def print_report(report: dict[str, Any]) -> None:
    modes = report["modes"]
    print(
        f"\nbits of each token, mean of {report['num_images']:,} images\n{'token':>6}",
        *(f"{mode:>9}" for mode in modes),
    )
    for position, bits in enumerate(zip(*(mode["bits"] for mode in modes.values()), strict=True), start=1):
        print(f"{position:>6}", *(f"{value:9.3f}" for value in bits))
    print(f"{'mean':>6}", *(f"{np.mean(mode['bits']):9.3f}" for mode in modes.values()))
    print(
        f"\nbytes of the payload, that of {report['lengths'][-1]} tokens decoded exactly\n{'tokens':>6}",
        *(f"{mode:>9}" for mode in modes),
    )
    for place, length in enumerate(report["lengths"]):
        print(f"{length:>6}", *(f"{mode['bytes'][place]:9.2f}" for mode in modes.values()))
    for name, mode in modes.items():
        over = mode["bytes_over_ideal"]
        print(
            f"{name}: {over['mean']:.3f} bytes over the ideal on average, {over['most']:.3f} at most, of all lengths; "
        )
        print(f"    {mode['milliseconds_to_decode']:.2f} ms to decode an image alone, all of its tokens")


def draw(report: dict[str, Any]) -> Any:
    figure, axes = plotting().subplots(figsize=(7, 4), layout="constrained")
    for name, mode in report["modes"].items():
        axes.plot(
            range(1, len(mode["bits"]) + 1), mode["bits"], label=f"{name}, {np.mean(mode['bits']):.2f} on average"
        )
    axes.set(
        xlabel="token", ylabel="bits", title=f"Bits of each token, {report['num_images']:,} test images", ylim=(0, None)
    )
    axes.legend()
    return figure


if __name__ == "__main__":
    run(main)
