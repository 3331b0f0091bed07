"""Write a tokenizer as ONNX, to run without PyTorch: an encoder, and a decoder of every length; checked after export.

    python3 scripts/export_onnx.py --checkpoint one-d-piece_fashion --output_dir my_onnx

encoder.onnx: pixels (B, 3, P, P) float32 in [0, 1] -> tokens (B, N) int64
decoder.onnx: tokens (B, N) int64, length (B,) int64 in 1..N -> image (B, 3, P, P) float32 in [0, 1]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse

import torch
from tqdm import tqdm

from modeling.onnx import DECODER, ENCODER, OnnxTokenizer, as_halved, differences, onnx_name, write_onnx
from modeling.tokenizers import load_tokenizer
from utils.errors import UserError
from utils.files import write_json
from utils.inference import parse_batch_size
from utils.lock import FolderLock
from utils.result_folder import ResultFolder

FACTS = "model.json"
PRECISIONS = ("fp32", "fp16")
NUM_CHECKED = 3  # images; an odd number, and not the batch size of the export
MOST_DIFFERENCE = 1.0  # grey levels of 255


def main() -> None:
    arguments = parse_arguments()
    with FolderLock(arguments.output_dir), ResultFolder(arguments.output_dir) as folder:
        export(arguments, folder)


def export(arguments: argparse.Namespace, folder: ResultFolder) -> None:
    """Write the files of each precision, then what they are."""
    names = [onnx_name(name, precision == "fp16") for precision in arguments.precision for name in (ENCODER, DECODER)]
    if note := folder.claim([*names, FACTS]):
        print(f"results        {note}")
    tokenizer, located = load_tokenizer(arguments.config, arguments.checkpoint)
    for precision in arguments.precision:
        halved = precision == "fp16"
        print(f"exporting {located.name} in {precision}: up to a minute for a large model", flush=True)
        paths = write_onnx(tokenizer, folder, halved)
        if halved:
            as_halved(tokenizer)
        check(tokenizer, OnnxTokenizer(paths), arguments.num_lengths)
        for path in paths.values():
            print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB")
    facts = {
        "model": located.name,
        "image_size": tokenizer.image_size,
        "num_tokens": tokenizer.num_latent_tokens,
        "codebook_size": tokenizer.codebook_size,
        "precisions": arguments.precision,
    }
    write_json(folder / FACTS, facts)
    print(f"wrote {folder.path / FACTS}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", help="whatever from_pretrained takes (default: the bundled tokenizer)")
    parser.add_argument("--config", help="configuration of a checkpoint that has none")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the files go")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="of the stored weights; arithmetic is float32 in both (default: both)",
    )
    parser.add_argument(
        "--num_lengths",
        type=parse_batch_size,
        metavar="N",
        help="lengths that are checked, evenly spread over 1..N (default: all of them)",
    )
    arguments = parser.parse_args()
    arguments.precision.sort(key=PRECISIONS.index)  # fp16 rounds the weights that fp32 needs
    return arguments


def check(tokenizer, exported: OnnxTokenizer, num_lengths: int | None) -> None:
    """Compare with PyTorch on noise: tokens must be equal, images within one grey level, at every length."""
    total, size = tokenizer.num_latent_tokens, tokenizer.image_size
    lengths = range(1, total + 1)
    if tokenizer.strict_length_assertion:
        lengths = [total]
    elif num_lengths is not None:
        lengths = sorted({round(1 + step * (total - 1) / max(1, num_lengths - 1)) for step in range(num_lengths)})
    pixels = torch.rand(NUM_CHECKED, 3, size, size, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    steps = tqdm(differences(tokenizer, exported, pixels, lengths), "checking lengths", len(lengths), disable=None)
    for length, difference in steps:
        worst = max(worst, difference)
        if difference > MOST_DIFFERENCE:
            raise UserError(
                f"the exported decoder differs from PyTorch by {difference:.2f} grey levels at {length} tokens, more "
                f"than {MOST_DIFFERENCE:g}: do not use it, and report torch's and onnxruntime's versions"
            )
    print(f"tokens equal to PyTorch's, images within {worst:.4f} of 255 grey levels at {len(lengths)} lengths")


if __name__ == "__main__":
    run(main)
