"""A tiny tokenizer, shards and a generator's configuration for the tests of what generators need."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from modeling.one_d_piece import OneDPiece
from modeling.tokenizers import frozen_tokenizer
from tests.fill import fill
from tests.shard_data import SIDE, make_shards
from utils.config import load_config, save_config, to_plain
from utils.paths import ROOT

NUM_TOKENS, NUM_CODES = 8, 64
SMALL = [
    "dataset.type=shards",
    "dataset.params.num_workers_per_gpu=0",
    "dataset.params.num_eval_examples=null",
    f"dataset.preprocessing.resize_shorter_edge={SIDE}",
    f"dataset.preprocessing.crop_size={SIDE}",
    "dataset.preprocessing.random_flip=True",
    f"model.vq_model.num_latent_tokens={NUM_TOKENS}",
    f"model.vq_model.codebook_size={NUM_CODES}",
    "model.pixel_vqgan.codebook_size=16",
    "model.pixel_vqgan.latent_channels=8",
    "model.generator.hidden_size=32",
    "model.generator.num_hidden_layers=2",
    "model.generator.num_attention_heads=2",
    "model.generator.intermediate_size=64",
    "model.generator.num_steps=3",
    "experiment.max_train_examples=20",
    "experiment.save_every=3",
    "experiment.keep_last=9",
    "experiment.log_every=2",
    "experiment.eval_every=6",
    "experiment.generate_every=6",
    "training.mixed_precision=no",
    "training.per_gpu_batch_size=4",
    "training.max_train_steps=6",
    "training.num_generated_images=2",
    "lr_scheduler.params.warmup_steps=2",
]


def make_world(folder: Path) -> Path:
    """Shards of 20 and 7 images, two tokenizers of other weights, and `generator.yaml` for all that."""
    make_shards(folder / "train", [9, 4, 7])
    make_shards(folder / "eval", [5, 2])
    config = to_plain(small_config(folder))
    del config["model"]["generator"]
    for name, seed in (("tokenizer", 0), ("other", 1)):
        fill(OneDPiece(config), seed).save_pretrained(folder / name)
    save_config(small_config(folder), folder / "generator.yaml")
    return folder


def small_config(folder: Path, *overrides: str):
    """configs/fashion/generator.yaml, made as small as a test needs, with its data and tokenizer in `folder`."""
    places = [
        f"dataset.params.train_shards_path_or_url={folder}/train/s-{{000000..000002}}.tar",
        f"dataset.params.eval_shards_path_or_url={folder}/eval/s-{{000000..000001}}.tar",
        f"dataset.params.token_set={folder}/tokens",
        f"experiment.tokenizer_checkpoint={folder}/tokenizer",
        f"experiment.output_dir={folder}/run",
    ]
    return load_config(ROOT / "configs/fashion/generator.yaml", [*SMALL, *places, *overrides])


def tokenizer_of(folder: Path) -> OneDPiece:
    return frozen_tokenizer(folder / "tokenizer")


def call(monkeypatch, main: Callable[[], None], *arguments: object) -> None:
    """A command in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    main()


def on_two_processes(script: str, *arguments: object) -> None:
    """A command on two processes of one machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, str(ROOT / script), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr
