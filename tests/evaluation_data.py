"""Forty garments in shards, with a tiny tokenizer and generator, for the tests of the commands that evaluate."""

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data.loaders import evaluation_loader
from data.shard_files import Sample, write_manifest, write_shard
from modeling.maskgit import ImageBert
from modeling.one_d_piece import OneDPiece
from tests.fill import fill
from tests.generator_data import on_two_processes
from utils.cli import run
from utils.config import load_config, save_config
from utils.paths import ROOT

__all__ = ["NUM_IMAGES", "NUM_TOKENS", "command", "make_world", "on_two_processes", "originals", "small_config"]

SIDE, NUM_TOKENS, NUM_CODES = 32, 8, 64
COUNTS = (13, 16, 11)
NUM_IMAGES = sum(COUNTS)
SAMPLE = f"{ROOT}/assets/fashion_mnist_test/fashion-test-{{000000..000001}}.tar.gz"
SMALL = [
    "dataset.type=shards",
    "dataset.params.num_workers_per_gpu=0",
    "dataset.params.num_eval_examples=null",
    f"model.vq_model.num_latent_tokens={NUM_TOKENS}",
    f"model.vq_model.codebook_size={NUM_CODES}",
    "model.pixel_vqgan.channels=32",
    "model.pixel_vqgan.codebook_size=16",
    "model.pixel_vqgan.latent_channels=8",
    "model.generator.hidden_size=32",
    "model.generator.num_hidden_layers=2",
    "model.generator.num_attention_heads=2",
    "model.generator.intermediate_size=64",
    "model.generator.num_steps=2",
    "training.per_gpu_batch_size=8",
]


def small_config(folder: Path, *overrides: str):
    """The default model's configuration, made small, with data, tokenizer and generator in `folder`."""
    places = [
        f"dataset.params.eval_shards_path_or_url={folder}/shards/s-{{000000..000002}}.tar",
        f"dataset.params.train_shards_path_or_url={folder}/shards/s-{{000000..000002}}.tar",
        f"experiment.tokenizer_checkpoint={folder}/tokenizer",
        f"experiment.output_dir={folder}/tokenizer",
    ]
    return load_config(ROOT / "configs/fashion/generator.yaml", [*SMALL, *places, *overrides])


def make_world(folder: Path) -> Path:
    """`shards/`, `tokenizer/`, `generator/` and `config.yaml`, which names them all."""
    source = load_config(
        ROOT / "configs/fashion/eval.yaml", [*SMALL[:3], f"dataset.params.eval_shards_path_or_url={SAMPLE}"]
    )
    batch = next(iter(evaluation_loader(source, rank=0, world_size=1, batch_size=NUM_IMAGES)))
    (folder / "shards").mkdir()
    records, number = {}, 0
    for index, count in enumerate(COUNTS):
        samples = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(batch["image"][number].permute(1, 2, 0).numpy()).save(file, "PNG")
            # Keys in another order than the files.
            samples.append(Sample(f"{number * 7 % NUM_IMAGES:04d}", file.getvalue(), int(batch["class_id"][number])))
            number += 1
        name = f"s-{index:06d}.tar"
        records[name] = write_shard(folder / "shards" / name, samples)
    manifest = {"classes": [str(label) for label in range(10)], "splits": {"s": {"shards": records}}}
    write_manifest(folder / "shards", manifest)
    config = small_config(folder)
    save_config(config, folder / "config.yaml")
    fill(OneDPiece(config), 0).save_pretrained(folder / "tokenizer")
    fill(ImageBert(config), 0).save_pretrained(folder / "generator")
    return folder


def originals(folder: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, images (n, 32, 32, 3) and labels, sorted by key."""
    loader = evaluation_loader(small_config(folder), rank=0, world_size=1)
    rows = [
        (key, image.permute(1, 2, 0).numpy(), int(label))
        for batch in loader
        for key, image, label in zip(batch["__key__"], batch["image"], batch["class_id"], strict=True)
    ]
    rows.sort(key=lambda row: row[0])
    return [row[0] for row in rows], np.stack([row[1] for row in rows]), np.array([row[2] for row in rows])


def command(monkeypatch, capsys, main, *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)])
    status = 0
    try:
        run(main)
    except SystemExit as exit_:
        status = exit_.code
    return status, *capsys.readouterr()
