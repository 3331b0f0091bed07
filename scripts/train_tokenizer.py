"""Train a tokenizer: stage 1 (predict the teacher's codes) or stage 2 (put pixels out), as the configuration says."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
from utils.config import training_arguments


def main() -> None:
    config = training_arguments(description=__doc__, example="configs/fashion/stage1.yaml", kind="tokenizer")
    # Slow to import, too slow for --help.
    from data.batches import check_count
    from data.dataset_facts import describe_dataset
    from data.loaders import loaders
    from modeling.tasks.tokenizer import tokenizer_task
    from utils.training.loop import make_accelerator, train

    describe_dataset(config)
    accelerator = make_accelerator(config)
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    train(tokenizer_task(config), config, accelerator, *loaders(config, **place), check_count)


if __name__ == "__main__":
    run(main)
