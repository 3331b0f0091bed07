"""Measure how fast the models run here, against what this machine's arithmetic can do.

    python3 scripts/benchmark.py
    python3 scripts/benchmark.py --model S L --only encode decode --precision bf16 --batch_size 64 --json speed.json

A large matrix product and a convolution give the machine's ceilings in the same precision. An item's share of the
ceiling is the time that its arithmetic (counted by torch) would take at the ceilings, over the time that it took.
Times are medians after a warm-up, items and ceilings taking turns, so that a busy machine slows both alike. Weights and
images are random: neither changes the amount of work.

    python3 scripts/benchmark.py --only reconstruct sample --against HEAD~20
    python3 scripts/benchmark.py --only reconstruct sample --precision bf16 --against plain

times each item in turn here and in another revision of this repository (with this script), or done plainly: eagerly,
in float32, in torch's default layouts, by torch's own choice of library and memory.

    python3 scripts/benchmark.py --model S --only decode --lengths 1 2 4 8 16 32 64 128 256 --figure lengths.png
    python3 scripts/benchmark.py --model S --only reconstruct stage1 --processes 1 2 --figure processes.png

show how cost grows. Several processes share the threads, take every turn together, and train as data-parallel ranks;
their images, arithmetic and memory are added up, and a turn lasts until the slowest has done it.
"""

import argparse
import contextlib
import gc
import io
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data.shard_files import Sample, write_shard
from modeling.contribution import replacement_changes
from modeling.modules import blocks
from modeling.tokenizers import build_tokenizer, encode_tokens
from utils.cli import pick_device, run
from utils.config import load_config
from utils.errors import UserError
from utils.figures import plotting, write_figure
from utils.images import to_array
from utils.paths import ROOT

PUBLISHED = {
    "stage1": "configs/training/stage1/one-d-piece_{}256.yaml",
    "stage2": "configs/training/stage2/one-d-piece_{}256.yaml",
    "generator": "configs/training/generator/maskgit_one-d-piece_{}256.yaml",
}
CONFIGS = {
    "tiny": {phase: f"configs/fashion/{phase}.yaml" for phase in PUBLISHED},
    **{size: {phase: path.format(size.lower()) for phase, path in PUBLISHED.items()} for size in "SBL"},
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ASSETS = ROOT / "assets"
SHORTEST = 0.05  # seconds: what is quicker is timed several times in a row
# Side of the matrices; batch, channels and side of the images: large enough to keep the device busy.
CEILING_SIZES = {"cpu": (2048, 4, 128, 64), "other": (8192, 32, 256, 128)}
PLAIN = "plain"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COPIED = 2**28  # bytes
NUM_OPERATORS = 12  # of a profile
COLUMNS = ("model", "item", "batch", "processes", "ms", "images/s", "GFLOP", "GFLOP/s", "of ceiling", "peak MiB")


@dataclass(frozen=True)
class Work:
    """Something to time: what it is called, one turn of it, and how many images a turn handles (0: none).

    Training does it after every so many turns of the item's work before it, if `every` is not 0. Where the number of
    tokens varies, `length` is that.
    """

    name: str
    turn: Callable[[], object]
    num_images: int = 0
    every: int = 0
    length: int | None = None


@dataclass(frozen=True)
class Setting:
    """One model in one precision on one device."""

    model: str
    device: torch.device
    precision: str
    batch_size: int
    lengths: Sequence[int]
    compile: bool = False
    clock: str = "wall"

    def config(self, phase: str, *overrides: str) -> DictConfig:
        """The model's configuration of "stage1", "stage2" or "generator"."""
        return load_config(
            ROOT / CONFIGS[self.model][phase], [f"training.per_gpu_batch_size={self.batch_size}", *overrides]
        )

    def images(self, config: DictConfig) -> Tensor:
        side = config.dataset.preprocessing.crop_size
        return torch.rand(self.batch_size, 3, side, side, device=self.device)

    def tokenizer(self, config: DictConfig) -> torch.nn.Module:
        return self.prepared(build_tokenizer(config))

    def prepared(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model for inference, compiled where that is asked for."""
        model = model.to(self.device).eval()
        if self.compile:
            from utils.speed import compile_blocks

            compile_blocks(model)
        return model

    def autocast(self) -> AbstractContextManager:
        dtype = DTYPES[self.precision]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Measurement:
    """What was found of one item; times in seconds, work in floating-point operations, memory in bytes.

    Memory is that of tensors, at its peak, beyond what there was before. Rates, work and memory are of all processes,
    the batch is that of each.
    """

    model: str
    item: str
    length: int | None
    batch_size: int
    processes: int
    seconds: float
    images_per_second: float | None
    flops: int
    flops_per_second: float
    share_of_ceiling: float | None
    peak_memory: int
    share_of_training: float | None


# ---------------------------------------------------------------- items: add one by writing its function and its row


def encode(setting: Setting) -> Iterator[Work]:
    config = setting.config("stage2")
    model = setting.tokenizer(config)
    images = setting.images(config)

    @torch.no_grad()
    def turn():
        with setting.autocast():
            return model.encode(images)

    yield Work("encode", turn, len(images))


def decode(setting: Setting) -> Iterator[Work]:
    config = setting.config("stage2")
    model = setting.tokenizer(config)
    total = model.num_latent_tokens
    tokens = torch.randint(model.codebook_size, (setting.batch_size, total), device=setting.device)
    for length in sorted({min(length, total) for length in setting.lengths}):

        @torch.no_grad()
        def turn(length=length):
            with setting.autocast():
                return model.decode_tokens(tokens, length=length)

        yield Work(f"decode {length}", turn, setting.batch_size, length=length)


def attend(setting: Setting) -> Iterator[Work]:
    """Attention of one encoder block, forward and backward: by our choice of arithmetic, and by torch's fused one."""
    with torch.device("meta"):  # for its sizes
        encoder = build_tokenizer(setting.config("stage1")).encoder
    num_heads = encoder.transformer[0].attn.num_heads
    num_patches, width = encoder.positional_embedding.shape  # and the class token
    positions = num_patches + encoder.latent_token_positional_embedding.shape[0]
    # In memory as a block's packed projection leaves them: the layout is part of the cost.
    shape = (setting.batch_size, positions, 3, num_heads, width // num_heads)
    packed = torch.randn(shape, device=setting.device, dtype=DTYPES[setting.precision], requires_grad=True)
    for name, function in (("attention", blocks.attention), ("attention, fused", F.scaled_dot_product_attention)):

        def turn(function=function):
            output = function(*packed.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)  # (B, T, W)
            return torch.autograd.grad(output, packed, output.detach())

        yield Work(name, turn, setting.batch_size)


def train_stage1(setting: Setting) -> Iterator[Work]:
    with tempfile.TemporaryDirectory() as folder:
        yield Work("stage-1 step", *tokenizer_step(setting, "stage1", folder)[1:])


def train_stage2(setting: Setting) -> Iterator[Work]:
    with tempfile.TemporaryDirectory() as folder:
        yield Work("stage-2 step", *tokenizer_step(setting, "stage2", folder)[1:])


def train_generator(setting: Setting) -> Iterator[Work]:
    """From a token set, and with the frozen tokenizer encoding the images of every step."""
    from modeling.tasks.generator import GeneratorTask

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("generator", f"experiment.output_dir={folder}")
        task = GeneratorTask(config)
        task.tokenizer = build_tokenizer(config).to(setting.device).eval().requires_grad_(False)
        tokens = torch.randint(task.model.codebook_size, (setting.batch_size, task.model.num_tokens))
        labels = {"class_id": torch.randint(task.model.num_classes, (setting.batch_size,)).to(setting.device)}
        training = make_run(setting, config, task)
        for source, batch in (
            ("tokens", {"tokens": tokens.to(setting.device)}),
            ("images", {"image": setting.images(config)}),
        ):
            yield Work(f"generator, {source}", one_update(training, batch | labels), setting.batch_size)


def sample(setting: Setting) -> Iterator[Work]:
    """Tokens of images by the config's sampler; and the guided pair of a step in one forward pass and in two."""
    from modeling.maskgit import generator_class
    from modeling.samplers.settings import sampler_settings

    config = setting.config("generator")
    model = setting.prepared(generator_class(config)(config))
    labels = torch.randint(model.num_classes, (setting.batch_size,)).to(setting.device)

    def generate():
        with setting.autocast():
            return model.generate(labels, **asdict(sampler_settings(config)))

    tokens = torch.full((setting.batch_size, model.num_tokens), model.mask_token, device=setting.device)
    dropped = torch.arange(2, device=setting.device).bool().repeat_interleave(setting.batch_size)

    @torch.no_grad()
    def batched():
        with setting.autocast():
            return model(tokens.repeat(2, 1), labels.repeat(2), dropped)

    @torch.no_grad()
    def apart():
        with setting.autocast():
            return [model(tokens, labels, half) for half in dropped.chunk(2)]

    yield Work("sample", generate, setting.batch_size)
    yield Work("guided, one pass", batched, setting.batch_size)
    yield Work("guided, two", apart, setting.batch_size)


def reconstruct(setting: Setting) -> Iterator[Work]:
    """From a loader's images to the rows of images.npy, as scripts/reconstruct_tokenizer.py goes; also one by one.

    The loader is an item of its own: one process of it is slower than a GPU.
    """
    from data.image_shards import evaluation_loader

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *image_shards(setting, Path(folder)))
        model = setting.tokenizer(config)
        for name, batch_size in (("reconstruct", setting.batch_size), ("reconstruct, 1 by 1", 1)):
            batches = list(evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size))

            @torch.no_grad()
            def turn(batches=batches):
                with setting.autocast():
                    for batch in batches:
                        to_array(model(batch["image"].to(setting.device) / 255)[0])

            yield Work(name, turn, setting.batch_size)


def contribute(setting: Setting) -> Iterator[Work]:
    """Images in which one token is replaced: a batch at once, and one token at a time; an image is such an image."""
    model = setting.tokenizer(setting.config("stage2"))
    tokens = torch.randint(model.codebook_size, (1, model.num_latent_tokens), device=setting.device)
    codes = torch.randint(model.codebook_size, (1, setting.batch_size, 1), device=setting.device)
    for name, batch_size in (("contribution", setting.batch_size), ("contribution, 1 by 1", 1)):

        def turn(batch_size=batch_size):
            with setting.autocast():
                for _ in replacement_changes(model, tokens, codes, batch_size):
                    pass

        yield Work(name, turn, setting.batch_size)


def load(setting: Setting) -> Iterator[Work]:
    """Training batches from shards by one process: divide a step's images/s by its own for the workers needed."""
    from data.image_shards import training_loader

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage1", *image_shards(setting, Path(folder)))
        batches = iter(training_loader(config, rank=0, world_size=1, batches_per_chunk=1000))
        yield Work("loader", partial(next, batches), setting.batch_size)


def pretokenize(setting: Setting) -> Iterator[Work]:
    """From shards to tokens, as scripts/pretokenize.py goes: in float32 whatever the precision."""
    from data.batches import FaultLog
    from data.catalogue import CentreCrop, ImageSource, decoded

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *image_shards(setting, Path(folder)))
        model = setting.tokenizer(config)
        (part,) = ImageSource(config, "eval", CentreCrop(config.dataset.preprocessing)).parts

        def turn():
            for examples in decoded(part, batch_size=setting.batch_size, num_threads=1, faults=FaultLog(strict=True)):
                images = torch.cat([example.image for example in examples]).to(setting.device)
                encode_tokens(model, images.float() / 255).cpu()

        yield Work("pretokenize", turn, setting.batch_size)


def save(setting: Setting) -> Iterator[Work]:
    """A whole checkpoint: weights, EMA, optimiser state, checksums, flush; and a step, of which it is a share."""
    with tempfile.TemporaryDirectory() as folder:
        training, turn, num_images = tokenizer_step(setting, "stage1", folder)
        training.output_dir = training.ranks.gather(training.output_dir)[0]  # one folder of all
        yield Work("step", turn, num_images)  # first, since the optimiser has no state before it
        yield Work("checkpoint", training.save, every=training.config.experiment.save_every)


ITEMS = {
    "encode": encode,
    "decode": decode,
    "attention": attend,
    "stage1": train_stage1,
    "stage2": train_stage2,
    "generator": train_generator,
    "sample": sample,
    "reconstruct": reconstruct,
    "contribution": contribute,
    "loader": load,
    "pretokenize": pretokenize,
    "checkpoint": save,
}


def image_shards(setting: Setting, folder: Path) -> list[str]:
    """Write a batch of images into a shard; what makes a configuration read it, for training and evaluation.

    They are the bundled ones: photographs as JPEG of ImageNet's usual size, garments as they are.
    """
    large = setting.config("stage2").dataset.preprocessing.crop_size > 32
    source, read = (ASSETS / "photos", jpeg) if large else (ASSETS / "fashion", Path.read_bytes)
    paths = sorted(source.glob("*.png"))
    if not paths:
        raise UserError(f"{source} must hold the bundled images, *.png, and has none: copy them from the repository")
    chosen = islice(cycle(map(read, paths)), setting.batch_size)
    write_shard(folder / "0.tar", (Sample(str(index), image, 0) for index, image in enumerate(chosen)))
    return [
        "dataset.type=shards",
        *(f"dataset.params.{split}_shards_path_or_url={folder / '0.tar'}" for split in ("train", "eval")),
        "dataset.params.num_eval_examples=null",
        "dataset.params.num_workers_per_gpu=0",
        # What the loader fills before its first batch.
        f"dataset.params.shuffle_buffer_size={setting.batch_size}",
    ]


def jpeg(path: Path) -> bytes:
    file = io.BytesIO()
    Image.open(path).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def tokenizer_step(setting: Setting, phase: str, folder: str) -> tuple:
    """The training loop's own update of a tokenizer: the loop, one turn of it, the number of images."""
    from modeling.pixel_vqgan import PixelVQGAN
    from modeling.tasks.tokenizer import tokenizer_task

    config = setting.config(
        phase,
        f"experiment.output_dir={folder}",
        # Without tail drop, whose draws would make every step another amount of work.
        "model.type=titok",
        "model.vq_model.strict_length_assertion=False",
        *(["training.compile=True"] if setting.compile else []),
        "training.codebook.warmup_steps=0",
        "training.codebook.kmeans=False",
        "training.codebook.restart_every=0",
    )
    if phase == "stage1":
        task = tokenizer_task(config)
        task.teacher = PixelVQGAN(config).eval().requires_grad_(False)
        step = 0
    else:
        task = stage2_task(config, folder)
        step = min(config.losses.discriminator_start, config.training.max_train_steps - 1)  # the adversary has joined
    training = make_run(setting, config, task)
    return training, one_update(training, {"image": setting.images(config)}, step), setting.batch_size


def make_run(setting: Setting, config: DictConfig, task):
    """The training loop around a task, in the setting's precision."""
    from accelerate import Accelerator

    from utils.training.run import Run

    mixed_precision = setting.precision if setting.precision in ("bf16", "fp16") else "no"
    if mixed_precision != "no":  # what autocast leaves in float32 is as in training
        allow_tf32(config.training.enable_tf32)
    return Run(task, config, Accelerator(mixed_precision=mixed_precision, cpu=setting.device.type == "cpu"))


def one_update(training, batch: dict[str, Tensor], step: int = 0) -> Callable[[], None]:
    """A turn that does the update with index `step` on `batch`, again and again."""
    from utils.training.loop import update

    def turn():
        training.step = step
        update(training, [batch])

    return turn


def stage2_task(config: DictConfig, folder: str):
    """The task of stage 2; where ConvNeXt-Small's weights would have to be downloaded, it has random ones."""
    from modeling.networks.perceptual import PerceptualDistance
    from modeling.tasks.tokenizer import tokenizer_task

    if config.losses.perceptual_loss != "convnext_s":
        return tokenizer_task(config)
    import torchvision
    from safetensors.torch import save_file

    weights = Path(folder) / "convnext_small.safetensors"
    save_file(torchvision.models.convnext_small().state_dict(), weights)
    perceptual_weight, config.losses.perceptual_weight = config.losses.perceptual_weight, 0.0
    task = tokenizer_task(config)
    config.losses.perceptual_weight = perceptual_weight
    task.perceptual = PerceptualDistance("convnext_s", weights)
    return task


# ------------------------------------------------------------------------------------------------------- measuring


def ceilings(setting: Setting) -> dict[str, Work]:
    """Arithmetic that this machine does best: a matrix product, and a 3 x 3 convolution.

    By the library and in the layout that are faster: which ones depends on the processor and the precision.
    """
    kind = {"device": setting.device, "dtype": DTYPES[setting.precision]}
    side, batch, channels, pixels = CEILING_SIZES["cpu" if setting.device.type == "cpu" else "other"]
    left, right = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    images, kernel = torch.randn(batch, channels, pixels, pixels, **kind), torch.randn(channels, channels, 3, 3, **kind)

    def convolution(layout: torch.memory_format) -> Callable[[], Tensor]:
        operands = [operand.contiguous(memory_format=layout) for operand in (images, kernel)]
        return lambda: F.conv2d(*operands, padding=1)

    def fastest(ways: dict[str, Callable[[], Tensor]]) -> str:
        return min(ways, key=lambda name: min(time_turns(ways[name], setting) for _ in range(3)))

    products = {"torch": lambda: F.linear(left, right)}
    if setting.device.type == "cpu" and left.dtype in blocks.ONEDNN_DTYPES:
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    layouts = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}
    convolutions = {name: convolution(layout) for name, layout in layouts.items()}
    library, layout = fastest(products), fastest(convolutions)
    return {
        "matmul": Work(f"matmul ({library})", products[library]),
        "convolution": Work(f"convolution ({layout})", convolutions[layout]),
    }


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    timer = Timer(Work("copy", partial(target.copy_, source)), setting)
    return 2 * COPIED / statistics.median(timer() for _ in range(5))


def count_flops(turn: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations of one turn, those of convolutions apart; forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=ONEDNN_FLOPS) as counter:
        turn()
    counts = counter.get_flop_counts().get("Global", {})
    convolution = sum(count for operator, count in counts.items() if "convolution" in str(operator))
    return {"matmul": counter.get_total_flops() - convolution, "convolution": convolution}


def linear_flops(x: Sequence[int], weight: Sequence[int], *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


ONEDNN_FLOPS = {torch.ops.mkldnn._linear_pointwise: linear_flops} if torch.backends.mkldnn.is_available() else {}


def peak_memory(turn: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that one turn adds to those there were."""
    if device.type == "cuda":
        gc.collect()  # what earlier items left behind, which could be freed meanwhile
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        turn()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        turn()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def operators(turn: Callable[[], object], device: torch.device) -> str:
    """A table of the operators of one turn that take the most time by themselves."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        turn()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=NUM_OPERATORS, max_name_column_width=40)


def time_turns(turn: Callable[[], object], setting: Setting, count: int = 1) -> float:
    """Seconds a turn, of `count` turns in a row."""
    if setting.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            turn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / count
    clock = CLOCKS[setting.clock]
    begun = clock()
    for _ in range(count):
        turn()
    if setting.device.type != "cpu":
        torch.accelerator.synchronize()
    return (clock() - begun) / count


class Timer:
    """Seconds a turn of a work, warm; what is short is timed several times in a row. `flops` are those of a turn."""

    def __init__(self, work: Work, setting: Setting):
        self.work, self.setting = work, setting
        self.flops = count_flops(work.turn)  # this warms up, too
        if setting.compile:
            work.turn()  # but torch.compile does nothing while operations are counted
        self.count = max(1, round(SHORTEST / time_turns(work.turn, setting)))

    def __call__(self) -> float:
        return time_turns(self.work.turn, self.setting, self.count)


Timers = dict[str, Timer]  # of the two ceilings, and of the "work" that takes turns with them


def medians(timers: dict[str, Callable[[], float]], num_repeats: int) -> dict[str, float]:
    """Median seconds of each, all taking turns."""
    times = [{name: timer() for name, timer in timers.items()} for _ in range(num_repeats)]
    return {name: statistics.median(time[name] for time in times) for name in timers}


def ceiling_timers(setting: Setting) -> Timers:
    return {name: Timer(work, setting) for name, work in ceilings(setting).items()}


def timed_works(arguments: argparse.Namespace, beside: Timers) -> Iterator[tuple[dict[str, Any], Timers]]:
    """Build every work: what there is to say of it but its time, and what times it and what is `beside` it."""
    for setting in settings(arguments):
        for item in arguments.only:
            allow_tf32(setting.precision == "tf32")  # training may have changed it
            try:
                for work in ITEMS[item](setting):
                    timers = {"work": Timer(work, setting), **beside}
                    about = {
                        "model": setting.model,
                        "item": work.name,
                        "length": work.length,
                        "batch_size": setting.batch_size,
                        "num_images": work.num_images,
                        "every": work.every,
                        "flops": {name: timer.flops for name, timer in timers.items()},
                        "counts": {name: timer.count for name, timer in timers.items()},
                        "peak_memory": peak_memory(work.turn, setting.device),
                        "profile": operators(work.turn, setting.device) if arguments.profile else "",
                    }
                    yield about, timers
            except torch.OutOfMemoryError:
                if arguments.serve:  # the others would go on to another item
                    raise
                print(f"{setting.model:7}{item}: a batch of {setting.batch_size} does not fit into memory", flush=True)


def measure(arguments: argparse.Namespace, beside: Timers) -> Iterator[tuple[Measurement, str]]:
    """Time every work, each in turns with the ceilings; with its profile where that is asked for."""
    for num_processes in arguments.processes:
        seconds = 0.0
        if arguments.processes == [1]:
            works = timed_works(arguments, beside)
        else:
            works = together(arguments, num_processes)
        for about, timers in works:
            times = medians(timers, arguments.repeats)
            before, seconds = seconds, times["work"]
            flops, num_images = about["flops"], num_processes * about["num_images"]
            at_ceilings = sum(count / flops[name][name] * times[name] for name, count in flops["work"].items())
            total = num_processes * sum(flops["work"].values())
            found = Measurement(
                model=about["model"],
                item=about["item"],
                length=about["length"],
                batch_size=about["batch_size"],
                processes=num_processes,
                seconds=seconds,
                images_per_second=num_images / seconds if num_images else None,
                flops=total,
                flops_per_second=total / seconds,
                share_of_ceiling=at_ceilings / seconds if total else None,
                peak_memory=about["peak_memory"],
                share_of_training=seconds / (seconds + about["every"] * before) if about["every"] else None,
            )
            yield found, about["profile"]


# ---------------------------------------------------------------------------------------------- several processes


def together(
    arguments: argparse.Namespace, num_processes: int
) -> Iterator[tuple[dict[str, Any], dict[str, Callable[[], float]]]]:
    """`timed_works` of several processes at the same time: the slowest's seconds, and the memory of all."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": num_processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    servers = [start(ROOT, world=world | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(num_processes)]
    with running(servers):
        found = [receive(server) for server in servers]
        while found[0] is not None:
            # Ranks that train must do the same number of turns: the first one's.
            requests = {name: f"{name} {count}" for name, count in found[0]["counts"].items()}
            timers = {name: lambda request=request: max(ask(servers, request)) for name, request in requests.items()}
            yield found[0] | {"peak_memory": sum(one["peak_memory"] for one in found)}, timers
            found = ask(servers, "next")


@contextlib.contextmanager
def running(servers: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Servers that end at the latest with what stands inside."""
    with contextlib.ExitStack() as stack:
        for server in servers:
            stack.enter_context(server)
        stack.callback(lambda: [server.kill() for server in servers])
        yield


def start(tree: Path, *flags: str, world: dict[str, Any] | None = None) -> subprocess.Popen:
    """This script as a server, with the modules of `tree`; it has this command's own flags, and `flags` after them.

    `world` is the environment by which processes know each other.
    """
    command = [sys.executable, __file__, *sys.argv[1:], *flags, "--serve"]
    environment = os.environ | {name: str(value) for name, value in (world or {}).items()}
    environment["PYTHONPATH"] = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def receive(server: subprocess.Popen):
    """What a server says next; None at its end."""
    line = server.stdout.readline()
    if not line and server.wait():
        raise UserError(
            "a process could not do this item (see above): name with --only what it can, with --against what both can"
        )
    return json.loads(line) if line else None


def ask(servers: Sequence[subprocess.Popen], request: str) -> list:
    """What servers answer to a request that they hear at the same time."""
    for server in servers:
        server.stdin.write(request + "\n")
        server.stdin.flush()
    return [receive(server) for server in servers]


def serve(arguments: argparse.Namespace) -> None:
    """The other end of `ask`: tell what the work is, then time as many turns as asked for, until the next is wanted."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), plainly() if arguments.plain else contextlib.nullcontext():
        beside = {} if arguments.against else ceiling_timers(settings(arguments)[0])
        for about, timers in timed_works(arguments, beside):
            print(json.dumps(about), file=answers, flush=True)
            while (request := sys.stdin.readline().split()) and request != ["next"]:
                name, count = request
                timers[name].count = int(count)
                print(json.dumps(timers[name]()), file=answers, flush=True)


# ------------------------------------------------------------------------------------------- against something else


@dataclass(frozen=True)
class Comparison:
    """An item here and there: seconds, the ratio there / here (how many times as fast it is here), peak bytes."""

    model: str
    item: str
    batch_size: int
    seconds: float
    seconds_there: float
    ratio: float
    flops: int
    flops_there: int
    peak_memory: int
    peak_memory_there: int


@contextlib.contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The files of a revision of this repository."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)

    with tempfile.TemporaryDirectory() as folder:
        added = git("worktree", "add", "--detach", folder, revision)
        if added.returncode:
            raise UserError(
                f"--against must be {PLAIN} or a revision of the git repository {ROOT}, got {revision}: "
                f"{added.stderr.strip().splitlines()[-1]}"
            )
        try:
            yield Path(folder)
        finally:
            git("worktree", "remove", "--force", folder)


def compare(arguments: argparse.Namespace) -> Iterator[Comparison]:
    """Every item in turns in two processes: these files, and those of `--against`."""
    with contextlib.ExitStack() as stack:
        if arguments.against == PLAIN:
            there = start(ROOT, "--plain", "--precision=fp32")
        else:
            there = start(stack.enter_context(checkout(arguments.against)))
        both = [start(ROOT), there]
        stack.enter_context(running(both))
        found = [receive(server) for server in both]
        while found[0] is not None:
            requests = [f"work {about['counts']['work']}" for about in found]
            times = [
                [ask([server], request)[0] for server, request in zip(both, requests, strict=True)]
                for _ in range(arguments.repeats)
            ]
            seconds = [statistics.median(column) for column in zip(*times, strict=True)]
            flops = [sum(about["flops"]["work"].values()) for about in found]
            here, other = found
            yield Comparison(
                model=here["model"],
                item=here["item"],
                batch_size=here["batch_size"],
                seconds=seconds[0],
                seconds_there=seconds[1],
                ratio=seconds[1] / seconds[0],
                flops=flops[0],
                flops_there=flops[1],
                peak_memory=here["peak_memory"],
                peak_memory_there=other["peak_memory"],
            )
            found = ask(both, "next")


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Without what our networks do about speed."""
    from modeling.modules import blocks, conv

    with (
        mock.patch.object(blocks, "ONEDNN_DTYPES", ()),
        mock.patch.object(conv, "LAYOUT", torch.contiguous_format),
        mock.patch.object(conv, "_silu", F.silu),
        mock.patch.object(conv, "_enlarged", lambda x, conv: conv(F.interpolate(x, scale_factor=2.0))),
    ):
        yield


# ------------------------------------------------------------------------------------------------- the command line


def settings(arguments: argparse.Namespace) -> list[Setting]:
    device = pick_device(arguments.device)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    allow_tf32(arguments.precision == "tf32")
    return [
        Setting(
            model=model,
            device=device,
            precision=arguments.precision,
            batch_size=batch_size,
            lengths=arguments.lengths,
            compile=arguments.compile and not arguments.plain,
            clock=arguments.clock,
        )
        for model in arguments.model
        for batch_size in arguments.batch_size or [32 if device.type != "cpu" else 16 if model == "tiny" else 4]
    ]


def allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def main() -> None:
    # The profiler, which counts memory, would complain of the lack of a GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    arguments = parse_arguments()
    if arguments.serve:
        serve(arguments)
        return
    torch.set_num_threads(max(1, torch.get_num_threads() // max(arguments.processes)))
    device = pick_device(arguments.device)
    if arguments.clock == "cpu" and device.type != "cpu":
        raise UserError(f"--clock cpu cannot time what {device} does: leave it out, or give --device cpu")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    how = f"{arguments.precision}, {'compiled' if arguments.compile else 'eager'}, {arguments.clock} clock"
    title = f"{place}, threads: {torch.get_num_threads()}, {how}, torch {torch.__version__}"
    print(title)
    record = {
        "device": place,
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "compile": arguments.compile,
        "clock": arguments.clock,
        "torch": torch.__version__,
    }
    if arguments.against:
        record |= {"against": arguments.against, "results": against(arguments)}
    else:
        record |= alone(arguments, title)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def alone(arguments: argparse.Namespace, title: str) -> dict:
    setting, found = settings(arguments)[0], []
    beside = ceiling_timers(setting)
    seconds = medians(beside, arguments.repeats)
    rates = {name: timer.flops[name] / seconds[name] for name, timer in beside.items()}
    copied = copy_bandwidth(setting)
    limits = [f"{timer.work.name} {rates[name] / 1e9:,.0f} GFLOP/s" for name, timer in beside.items()]
    print("ceilings: " + ", ".join([*limits, f"copy {copied / 1e9:,.1f} GB/s"]))
    print("\n" + line(COLUMNS))
    for measurement, profiled in measure(arguments, beside):
        found.append(measurement)
        print(line(row(measurement)), flush=True)
        if (share := measurement.share_of_training) is not None:
            print(f"{'':7}as often as the configuration wants: {share:.2%} of training time")
        if profiled:
            print(profiled, flush=True)
    if arguments.figure:
        figure = draw(found, varied(arguments), title=f"{', '.join(arguments.model)}: {title}")
        write_figure(figure, arguments.figure.with_suffix(""))
    return {
        "ceilings_flops_per_second": rates,
        "copied_bytes_per_second": copied,
        "results": [asdict(one) for one in found],
    }


def against(arguments: argparse.Namespace) -> list[dict]:
    print("\n" + line(("model", "item", "batch", "ms", "there", "ratio", "GFLOP", "there", "peak MiB", "there")))
    found = []
    for one in compare(arguments):
        found.append(asdict(one))
        times = [f"{seconds * 1000:.2f}" for seconds in (one.seconds, one.seconds_there)]
        work = [f"{flops / 1e9:.2f}" for flops in (one.flops, one.flops_there)]
        memory = [f"{memory / 2**20:,.0f}" for memory in (one.peak_memory, one.peak_memory_there)]
        print(line((one.model, one.item, str(one.batch_size), *times, f"{one.ratio:.2f}", *work, *memory)), flush=True)
    return found


def row(found: Measurement) -> tuple[str, ...]:
    return (
        found.model,
        found.item,
        str(found.batch_size),
        str(found.processes),
        f"{found.seconds * 1000:.2f}",
        three_digits(found.images_per_second) if found.images_per_second else "-",
        f"{found.flops / 1e9:.2f}",
        f"{found.flops_per_second / 1e9:.1f}",
        f"{found.share_of_ceiling:.0%}" if found.share_of_ceiling is not None else "-",
        f"{found.peak_memory / 2**20:,.0f}",
    )


def three_digits(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:7}{cells[1]:21}" + "".join(f"{cell:>11}" for cell in cells[2:])


def varied(arguments: argparse.Namespace) -> str | None:
    """What a figure goes along: a field of `Measurement`."""
    if len(arguments.processes) > 1:
        return "processes"
    if len(arguments.batch_size or []) > 1:
        return "batch_size"
    return "length" if len(arguments.lengths) > 1 and "decode" in arguments.only else None


def draw(found: Sequence[Measurement], along: str, title: str) -> Any:
    """Speed and memory of what handles images; dashed, how they would grow from the first point on by the work alone.

    That is: every process at the first point's speed of arithmetic (of images, where there is none), and memory in
    proportion to the images.
    """

    def images(one: Measurement) -> int:
        return one.processes * one.batch_size

    def rate(one: Measurement) -> float:
        return one.processes * images(one) / (one.flops or images(one))

    texts = {"model": "{}", "batch_size": "batch of {}", "processes": "{} processes"}
    differing = [name for name in texts if name != along and len({getattr(one, name) for one in found}) > 1]
    curves: dict[str, list[Measurement]] = {}
    for one in sorted(found, key=lambda one: getattr(one, along) or 0):
        if one.images_per_second and getattr(one, along) is not None:
            item = one.item.removesuffix(f" {one.length}") if along == "length" else one.item
            label = ", ".join([item, *(texts[name].format(getattr(one, name)) for name in differing)])
            curves.setdefault(label, []).append(one)
    pyplot = plotting()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    panels = (
        (axes[0], lambda one: one.images_per_second, rate),
        (axes[1], lambda one: one.peak_memory / 2**20, images),
    )
    for label, ones in curves.items():
        places = [getattr(one, along) for one in ones]
        for axis, measured, growth in panels:
            values = [measured(one) for one in ones]
            ideal = [values[0] * growth(one) / growth(ones[0]) for one in ones]
            (solid,) = axis.plot(places, values, label=label, marker="o", markersize=4)
            axis.plot(places, ideal, color=solid.get_color(), linestyle="--", linewidth=1)
    axes[0].set(ylabel="images/s", title="Speed (dashed: by the arithmetic alone)")
    axes[1].set(ylabel="MiB of tensors", title="Peak memory (dashed: in proportion to the images)")
    for axis in axes:
        axis.set(xlabel={"length": "tokens", "batch_size": "images in a batch"}.get(along, along))
        axis.set_ylim(0, 1.1 * axis.dataLim.ymax)
        axis.grid(alpha=0.3)
        if along == "length":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title, fontsize="small")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return figure


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", choices=CONFIGS, default=["tiny"], help="sizes: the bundled model's, or published ones")
    add("--only", nargs="+", choices=ITEMS, default=list(ITEMS), help="what to measure (default: everything)")
    numbers = {"nargs": "+", "type": int, "metavar": "N"}
    add("--batch_size", **numbers, help="images a turn (default: 32; on a CPU 16 for tiny, 4 for the others)")
    default = [8, 64, 256]
    add("--lengths", **numbers, default=default, help="tokens to decode; all, if a model has fewer (default: 8 64 256)")
    add("--processes", **numbers, default=[1], help="how many at the same time, in training as ranks (default: 1)")
    add("--precision", choices=DTYPES, default="fp32", help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timings to take the median of (default: %(default)s)")
    add("--compile", action="store_true", help="compile the networks' blocks first (torch.compile)")
    add(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: the process's own seconds, for one thread on a machine that has other work (default: %(default)s)",
    )
    add("--against", metavar="REVISION", help=f"time a git revision as well, or {PLAIN}: print ratios")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    add("--plain", action="store_true", help=argparse.SUPPRESS)
    add("--profile", action="store_true", help=f"print the {NUM_OPERATORS} most expensive operators of a turn")
    add("--figure", type=Path, metavar="FILE", help="draw the growth along several values as FILE.png and FILE.pdf")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    counts = {name: getattr(arguments, name) or [] for name in ("batch_size", "lengths", "processes")}
    for name, values in (counts | {"repeats": [arguments.repeats]}).items():
        if any(value < 1 for value in values):
            raise UserError(f"--{name} must be 1 or more, got {min(values)}")
    alone_only = arguments.figure or arguments.profile
    if arguments.against and (alone_only or len(counts["batch_size"]) > 1 or counts["processes"] != [1]):
        raise UserError(
            "--against compares one process here with one there: give it a single --batch_size, and no --processes, "
            "--figure or --profile"
        )
    if arguments.figure and varied(arguments) is None:
        raise UserError(
            "--figure needs something that varies, got one of each: give several --processes, several --batch_size, or "
            "--only decode with several --lengths"
        )
    return arguments


if __name__ == "__main__":
    if "--plain" in sys.argv:
        main()  # with torch's own use of memory: `run` changes it
    else:
        run(main)
