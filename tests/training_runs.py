"""Small training runs for tests/test_training.py; also a program, so that torchrun can start it on two processes.

torchrun --nproc_per_node 2 tests/training_runs.py FOLDER JOB [JOB ...]
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from data.batches import check_count
from data.loaders import loaders
from modeling.tasks.teacher import TeacherTask
from modeling.tasks.tokenizer import tokenizer_task
from utils.config import load_config
from utils.paths import ROOT
from utils.training.loop import make_accelerator, train

SMALL = [
    "experiment.save_every=3",
    "experiment.keep_last=9",
    "experiment.log_every=2",
    "experiment.eval_every=6",
    "experiment.generate_every=6",
    "experiment.max_train_examples=24",
    "dataset.type=folder",
    "dataset.params.num_workers_per_gpu=0",
    "dataset.params.num_eval_examples=null",
    "dataset.preprocessing.resize_shorter_edge=16",
    "dataset.preprocessing.crop_size=16",
    "model.pixel_vqgan.codebook_size=16",
    "model.pixel_vqgan.latent_channels=8",
    "training.mixed_precision=no",
    "training.per_gpu_batch_size=4",
    "training.max_train_steps=6",
    "training.num_generated_images=2",
    "training.codebook.warmup_steps=1",
    "training.codebook.restart_every=2",
    "lr_scheduler.params.warmup_steps=2",
]
TOKENIZER = ["model.vq_model.num_latent_tokens=4", "model.vq_model.codebook_size=32"]
ADVERSARY = ["losses.discriminator_start=2", "losses.discriminator_weight=0.1", "losses.perceptual_weight=0.0"]


def make_images(folder: Path, count: int = 24) -> None:
    """A folder of small images in two classes, for training and for evaluation."""
    rng = np.random.default_rng(0)
    for index in range(count):
        for split in ("train", "val"):
            path = folder / split / f"class{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC).save(path)


def job_overrides(job: str, folder: Path, output_dir: Path) -> list[str]:
    """What makes the Fashion-MNIST configuration of a job as small as a test needs."""
    by_gain = "model.vq_model.length_draw=by_gain"  # has a state that a resumed run needs
    extra = {"teacher": ADVERSARY, "stage1": [*TOKENIZER, by_gain], "stage2": [*TOKENIZER, *ADVERSARY]}[job]
    if job != "teacher":
        extra = [*extra, f"model.vq_model.pretrained_tokenizer_weight={folder / 'teacher'}"]
    if job == "stage2":
        extra = [*extra, f"experiment.init_weight={folder / 'stage1'}"]
    data = [f"dataset.params.train_folder={folder / 'train'}", f"dataset.params.eval_folder={folder / 'val'}"]
    place = f"experiment.output_dir={output_dir}"
    return [*SMALL, *extra, *data, place]


def job_config(job: str, folder: Path, output_dir: Path, *overrides: str):
    return load_config(ROOT / f"configs/fashion/{job}.yaml", [*job_overrides(job, folder, output_dir), *overrides])


def run_job(job: str, folder: Path, output_dir: Path, *overrides: str) -> None:
    config = job_config(job, folder, output_dir, *overrides)
    accelerator = make_accelerator(config)
    task = TeacherTask(config) if job == "teacher" else tokenizer_task(config)
    place = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    train(task, config, accelerator, *loaders(config, **place), check_count)


def run_and_resume(job: str, folder: Path) -> None:
    """Six steps into FOLDER/JOB; the last three again, from the third's checkpoint, into FOLDER/JOB-resumed."""
    straight, resumed = folder / job, folder / f"{job}-resumed"
    run_job(job, folder, straight)
    if is_main():
        resumed.mkdir()
        shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    wait()
    run_job(job, folder, resumed)


def differences(first: Path, second: Path) -> list[str]:
    """Names of the tensors that are not equal bit for bit in two output folders: final weights and training state."""
    found = []
    for name in sorted(path.relative_to(first) for path in first.rglob("*.safetensors")):
        if "checkpoint-3" in name.parts:
            continue
        ours, theirs = load_file(first / name), load_file(second / name)
        assert ours.keys() == theirs.keys()
        found += [f"{name}: {key}" for key in ours if not torch.equal(ours[key], theirs[key])]
    return found


def is_main() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sys.argv[2:]:
        run_and_resume(job, Path(sys.argv[1]))
