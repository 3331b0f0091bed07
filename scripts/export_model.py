"""Write a trained model as a small folder to share: config.json, model.safetensors in half precision, model card.

    python3 scripts/export_model.py --checkpoint checkpoints/fashion_stage2 --output_dir my_model

`from_pretrained(OUTPUT_DIR)` and every `--checkpoint OUTPUT_DIR` read it back.
"""

import argparse
from pathlib import Path

import torch

from modeling.weights import locate, model_class
from utils.cli import UserError, run

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="training output, checkpoint folder, file or hub id")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="precision of the file (default float16)")
    parser.add_argument("--card", help="Markdown file with the text of the model card")
    arguments = parser.parse_args()
    if arguments.card and not Path(arguments.card).is_file():
        raise UserError(f"--card {arguments.card} is not a file")

    located = locate(arguments.checkpoint)
    if located.config is None:
        raise UserError(f"{located.description} has no configuration beside it: give the training output folder")
    model = model_class(located.config).from_pretrained(located)
    card = Path(arguments.card).read_text(encoding="utf-8") if arguments.card else None
    model.save_pretrained(arguments.output_dir, card=card, dtype=DTYPES[arguments.dtype])
    size = sum(path.stat().st_size for path in Path(arguments.output_dir).iterdir())
    print(f"{type(model).__name__} of {located.description} in {arguments.output_dir}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    run(main)
