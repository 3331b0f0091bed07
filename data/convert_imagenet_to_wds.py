"""Write ImageNet into the shards that the configs under configs/training/ and configs/eval/ read.

    python3 data/convert_imagenet_to_wds.py --output_dir ./imagenet_sharded

The images come from the Hugging Face hub (accept the terms on the data set's page and log in with `hf auth login`;
150 GB are downloaded into the hub's cache), or from a local folder with train/ and val/ given as --source. The files'
own bytes are stored. Run it again after an interruption and it continues.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import os

from data import DataError
from data.image_sources import open_source
from data.make_shards import make_shards, report

HUB_ID = "ILSVRC/imagenet-1k"
HUB_SPLITS = {"train": "train", "val": "validation"}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="where imagenet-train-000000.tar, ... go")
    parser.add_argument("--max_train_samples_per_shard", type=int, default=4000)
    parser.add_argument("--max_val_samples_per_shard", type=int, default=1000)
    parser.add_argument(
        "--source", default=HUB_ID, help="hub data set, or a folder with train/ and val/ (default: %(default)s)"
    )
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes, one shard each at a time")
    parser.add_argument("--seed", type=int, default=0, help="mixes the images")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    folder = Path(arguments.source).expanduser()
    if folder.is_dir():
        if missing := [split for split in HUB_SPLITS if not (folder / split).is_dir()]:
            raise DataError(
                f"--source {folder} must be an ImageNet folder with train/ and val/, and has no {missing[0]}/"
            )
        splits = {split: split for split in HUB_SPLITS}
    else:
        splits = HUB_SPLITS
    # Both are opened before anything is written, so that what is missing shows at once.
    sources = {split: open_source(arguments.source, name) for split, name in splits.items()}
    for split, source in sources.items():
        prefix = f"imagenet-{split}"
        written = make_shards(
            source,
            arguments.output_dir,
            prefix=prefix,
            max_samples_per_shard=getattr(arguments, f"max_{split}_samples_per_shard"),
            num_workers=arguments.num_workers,
            seed=arguments.seed,
        )
        report(written, arguments.output_dir, prefix)


if __name__ == "__main__":
    run(main)
