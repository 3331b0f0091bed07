"""Train a generator over the tokens of a frozen tokenizer, made on the fly or read from a token set.

For dataset.type=tokens, scripts/pretokenize.py makes the token set once; training is then several times faster.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
from functools import partial

from utils.config import training_arguments


def main() -> None:
    config = training_arguments(description=__doc__, example="configs/fashion/generator.yaml", kind="generator")
    # Slow to import, too slow for --help.
    from data.batches import check_count
    from data.dataset_facts import describe_dataset
    from data.labels import Labelled
    from data.loaders import loaders
    from data.token_loader import check_token_sets
    from modeling.tasks.generator import GeneratorTask
    from utils.training.loop import make_accelerator, train

    describe_dataset(config)
    accelerator = make_accelerator(config)
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    task = GeneratorTask(config, check_tokenizer=partial(check_token_sets, config))
    training, evaluation = loaders(config, **place)
    num_classes = task.model.num_classes
    train(
        task,
        config,
        accelerator,
        lambda *start: Labelled(training(*start), num_classes),
        None if evaluation is None else lambda: Labelled(evaluation(), num_classes),
        check_count,
    )


if __name__ == "__main__":
    run(main)
