"""Measure how fast the models run here, against what this machine's arithmetic can do.

    python3 scripts/benchmark.py
    python3 scripts/benchmark.py --model S L --only encode decode --precision bf16 --batch_size 64 --json speed.json

A large matrix product and a channels-last convolution give the machine's ceilings in the same precision. An item's
share of the ceiling is the time that its arithmetic (counted by torch) would take at the ceilings, over the time that
it took. Times are medians after a warm-up, items and ceilings taking turns, so that a busy machine slows both alike.
Weights and pictures are random: neither changes the amount of work.

    python3 scripts/benchmark.py --only reconstruct sample --against HEAD~20
    python3 scripts/benchmark.py --only reconstruct sample --precision bf16 --against plain

times each item in turn here and in another revision of this repository (with this script), or done plainly: eagerly,
in float32, in torch's default layouts, by torch's own choice of library and memory.
"""

import argparse
import contextlib
import io
import json
import math
import os
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
from unittest import mock

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data.shard_files import Sample, write_shard
from modeling.analysis import replacement_changes
from modeling.modules.blocks import attention
from modeling.tokenizers import build_tokenizer, encode_tokens
from utils.cli import ROOT, UserError, pick_device, run
from utils.config import load_config
from utils.images import to_array

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
SHORTEST = 0.05  # seconds: what is quicker is timed several times in a row
LENGTHS = (8, 64, 256)
# Side of the matrices; batch, channels and side of the images: large enough to keep the device busy.
CEILING_SIZES = {"cpu": (2048, 4, 128, 64), "other": (8192, 32, 256, 128)}
PLAIN = "plain"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
COPIED = 2**28  # bytes
COLUMNS = ("model", "item", "batch", "ms", "images/s", "GFLOP", "GFLOP/s", "of ceiling", "peak MiB")


@dataclass(frozen=True)
class Work:
    """Something to time: what it is called, one turn of it, and how many images a turn handles (0: none).

    Training does it after every so many turns of the item's work before it, if `every` is not 0.
    """

    name: str
    turn: Callable[[], object]
    num_images: int = 0
    every: int = 0


@dataclass(frozen=True)
class Setting:
    """One model in one precision on one device."""

    model: str
    device: torch.device
    precision: str
    batch_size: int
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

    Memory is that of tensors, at its peak, beyond what there was before.
    """

    model: str
    item: str
    batch_size: int
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
    for length in sorted({min(length, total) for length in LENGTHS}):

        @torch.no_grad()
        def turn(length=length):
            with setting.autocast():
                return model.decode_tokens(tokens, length=length)

        yield Work(f"decode {length}", turn, setting.batch_size)


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
    for name, function in (("attention", attention), ("attention, fused", F.scaled_dot_product_attention)):

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
    """From a token set, and with the frozen tokenizer encoding the pictures of every step."""
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
    from modeling.maskgit import generator_class, sampler_settings

    config = setting.config("generator")
    model = setting.prepared(generator_class(config)(config))
    labels = torch.randint(model.num_classes, (setting.batch_size,)).to(setting.device)

    def generate():
        with setting.autocast():
            return model.generate(labels, **sampler_settings(config))

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
    """From shards to the rows of images.npy, as scripts/reconstruct_tokenizer.py goes; in batches and one by one."""
    from data.image_shards import evaluation_loader

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *picture_shards(setting, Path(folder)))
        model = setting.tokenizer(config)
        for name, batch_size in (("reconstruct", setting.batch_size), ("reconstruct, 1 by 1", 1)):
            batches = evaluation_loader(config, rank=0, world_size=1, batch_size=batch_size)

            @torch.no_grad()
            def turn(batches=batches):
                with setting.autocast():
                    for batch in batches:
                        to_array(model(batch["image"].to(setting.device) / 255)[0])

            yield Work(name, turn, setting.batch_size)


def contribute(setting: Setting) -> Iterator[Work]:
    """Pictures in which one token is replaced: a batch at once, and one token at a time; an image is such a picture."""
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
        config = setting.config("stage1", *picture_shards(setting, Path(folder)))
        batches = iter(training_loader(config, rank=0, world_size=1, batches_per_chunk=1000))
        yield Work("loader", partial(next, batches), setting.batch_size)


def pretokenize(setting: Setting) -> Iterator[Work]:
    """From shards to tokens, as scripts/pretokenize.py goes: in float32 whatever the precision."""
    from data.batches import FaultLog
    from data.token_source import CentreCrop, PictureSource, decoded

    with tempfile.TemporaryDirectory() as folder:
        config = setting.config("stage2", *picture_shards(setting, Path(folder)))
        model = setting.tokenizer(config)
        (part,) = PictureSource(config, "eval", CentreCrop(config.dataset.preprocessing)).parts

        def turn():
            for examples in decoded(part, batch_size=setting.batch_size, num_threads=1, faults=FaultLog(strict=True)):
                images = torch.cat([example.image for example in examples]).to(setting.device)
                encode_tokens(model, images.float() / 255).cpu()

        yield Work("pretokenize", turn, setting.batch_size)


def save(setting: Setting) -> Iterator[Work]:
    """A whole checkpoint: weights, EMA, optimiser state, checksums, flush; and a step, of which it is a share."""
    with tempfile.TemporaryDirectory() as folder:
        training, turn, num_images = tokenizer_step(setting, "stage1", folder)
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


def picture_shards(setting: Setting, folder: Path) -> list[str]:
    """Write a batch of pictures into a shard; what makes a configuration read it, for training and evaluation.

    They are the bundled ones: photographs as JPEG of ImageNet's usual size, garments as they are.
    """
    if setting.config("stage2").dataset.preprocessing.crop_size > 32:
        pictures = [jpeg(path) for path in sorted((ROOT / "assets/photos").glob("*.png"))]
    else:
        pictures = [path.read_bytes() for path in sorted((ROOT / "assets/fashion").glob("*.png"))]
    chosen = islice(cycle(pictures), setting.batch_size)
    write_shard(folder / "0.tar", (Sample(str(index), picture, 0) for index, picture in enumerate(chosen)))
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

    from utils.training import Run

    mixed_precision = setting.precision if setting.precision in ("bf16", "fp16") else "no"
    return Run(task, config, Accelerator(mixed_precision=mixed_precision, cpu=setting.device.type == "cpu"))


def one_update(training, batch: dict[str, Tensor], step: int = 0) -> Callable[[], None]:
    """A turn that does the update with index `step` on `batch`, again and again."""

    def turn():
        training.step = step
        training.update([batch])

    return turn


def stage2_task(config: DictConfig, folder: str):
    """The task of stage 2; where ConvNeXt-Small's weights would have to be downloaded, it has random ones."""
    from modeling.modules.features import PerceptualDistance
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
    """Arithmetic that this machine does best: a matrix product, and a 3 x 3 convolution in channels-last layout."""
    kind = {"device": setting.device, "dtype": DTYPES[setting.precision]}
    side, batch, channels, pixels = CEILING_SIZES["cpu" if setting.device.type == "cpu" else "other"]
    left, right = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    images = torch.randn(batch, channels, pixels, pixels, **kind).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, **kind).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def product():
        if setting.device.type == "cpu" and torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")  # more than twice MKL's on AMD
        return left @ right

    return {
        "matmul": Work("matrix product", product),
        "convolution": Work("convolution", torch.no_grad()(lambda: F.conv2d(images, kernel, padding=1))),
    }


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    turn = partial(target.copy_, source)
    turn()
    return 2 * COPIED / statistics.median(time_turns(turn, setting) for _ in range(5))


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
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        turn()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        turn()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


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
    """Seconds a turn of a work that is warm; what is short is timed several times in a row."""

    def __init__(self, work: Work, setting: Setting):
        self.turn, self.setting = work.turn, setting
        self.count = max(1, round(SHORTEST / time_turns(self.turn, setting)))

    def __call__(self) -> float:
        return time_turns(self.turn, self.setting, self.count)


def medians(timers: dict[str, Callable[[], float]], num_repeats: int) -> dict[str, float]:
    """Median seconds of each, all taking turns."""
    times = [{name: timer() for name, timer in timers.items()} for _ in range(num_repeats)]
    return {name: statistics.median(time[name] for time in times) for name in timers}


class Benchmark:
    """Times works of one setting, each in turns with the ceilings."""

    def __init__(self, setting: Setting, num_repeats: int):
        self.setting = setting
        self.num_repeats = num_repeats
        works = ceilings(setting)
        self.flops = {name: sum(count_flops(work.turn).values()) for name, work in works.items()}
        self.ceilings = {name: Timer(work, setting) for name, work in works.items()}

    def measure_ceilings(self) -> dict[str, float]:
        """Floating-point operations a second, by kind."""
        seconds = medians(self.ceilings, self.num_repeats)
        return {name: self.flops[name] / seconds[name] for name in self.ceilings}

    def measure(self, item: str) -> Iterator[Measurement]:
        """Build an item and time its works."""
        seconds = 0.0
        for work in ITEMS[item](self.setting):
            flops = count_flops(work.turn)  # this warms up, too
            peak = peak_memory(work.turn, self.setting.device)
            times = medians({"work": Timer(work, self.setting), **self.ceilings}, self.num_repeats)
            before, seconds = seconds, times["work"]
            at_ceilings = sum(flops[name] / self.flops[name] * times[name] for name in self.ceilings)
            total = sum(flops.values())
            yield Measurement(
                model=self.setting.model,
                item=work.name,
                batch_size=self.setting.batch_size,
                seconds=seconds,
                images_per_second=work.num_images / seconds if work.num_images else None,
                flops=total,
                flops_per_second=total / seconds,
                share_of_ceiling=at_ceilings / seconds if total else None,
                peak_memory=peak,
                share_of_training=seconds / (seconds + work.every * before) if work.every else None,
            )


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
        both = [stack.enter_context(process) for process in (start(ROOT), there)]
        stack.callback(lambda: [process.kill() for process in both])
        while (found := [receive(process) for process in both])[0] is not None:
            times = [[ask(process, "turn") for process in both] for _ in range(arguments.repeats)]
            seconds = [statistics.median(column) for column in zip(*times, strict=True)]
            here, other = found
            yield Comparison(
                model=here["model"],
                item=here["item"],
                batch_size=here["batch_size"],
                seconds=seconds[0],
                seconds_there=seconds[1],
                ratio=seconds[1] / seconds[0],
                flops=here["flops"],
                flops_there=other["flops"],
                peak_memory=here["peak_memory"],
                peak_memory_there=other["peak_memory"],
            )
            for process in both:
                process.stdin.write("next\n")
                process.stdin.flush()


def start(tree: Path, *flags: str) -> subprocess.Popen:
    """This script as a server, with the modules of `tree`; it has this command's own flags, and `flags` after them."""
    command = [sys.executable, __file__, *sys.argv[1:], *flags, "--serve"]
    path = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def receive(process: subprocess.Popen):
    """What a server says next; None at its end."""
    line = process.stdout.readline()
    if not line and process.wait():
        raise UserError("one of the two could not do this item (see above): name what both can with --only")
    return json.loads(line) if line else None


def ask(process: subprocess.Popen, request: str):
    process.stdin.write(request + "\n")
    process.stdin.flush()
    return receive(process)


def serve(arguments: argparse.Namespace) -> None:
    """The other end of `compare`: tell what the item is, then time a turn whenever asked for one."""
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), plainly() if arguments.plain else contextlib.nullcontext():
        for setting in settings(arguments):
            for work in (work for item in arguments.only for work in ITEMS[item](setting)):
                about = {"model": setting.model, "item": work.name, "batch_size": setting.batch_size}
                about["flops"] = sum(count_flops(work.turn).values())  # this warms up, too
                about["peak_memory"] = peak_memory(work.turn, setting.device)
                timer = Timer(work, setting)
                print(json.dumps(about), file=answers, flush=True)
                while sys.stdin.readline().strip() == "turn":
                    print(json.dumps(timer()), file=answers, flush=True)


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


def settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    device = pick_device(arguments.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.precision == "tf32"
    for model in arguments.model:
        default = 32 if device.type != "cpu" else 16 if model == "tiny" else 4
        yield Setting(
            model, device, arguments.precision, arguments.batch_size or default, arguments.compile, arguments.clock
        )


def main() -> None:
    # The profiler, which counts memory, would complain of the lack of a GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    arguments = parse_arguments()
    if arguments.serve:
        serve(arguments)
        return
    device = pick_device(arguments.device)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    how = f"{arguments.precision}, {'compiled' if arguments.compile else 'eager'}, {arguments.clock} clock"
    print(f"{place}, {torch.get_num_threads()} threads, {how}, torch {torch.__version__}")
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
        record |= alone(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def alone(arguments: argparse.Namespace) -> dict:
    record, found = {}, []
    for setting in settings(arguments):
        benchmark = Benchmark(setting, arguments.repeats)
        if not record:
            record = {
                "ceilings_flops_per_second": benchmark.measure_ceilings(),
                "copied_bytes_per_second": copy_bandwidth(setting),
            }
            limits = [f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in record["ceilings_flops_per_second"].items()]
            print("ceilings: " + ", ".join([*limits, f"copy {record['copied_bytes_per_second'] / 1e9:,.1f} GB/s"]))
            print("\n" + line(COLUMNS))
        for item in arguments.only:
            for measurement in benchmark.measure(item):
                found.append(measurement)
                print(line(row(measurement)), flush=True)
                if (share := measurement.share_of_training) is not None:
                    print(f"{'':7}as often as the configuration wants: {share:.2%} of training time")
    return record | {"results": [asdict(one) for one in found]}


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
        f"{found.seconds * 1000:.2f}",
        f"{found.images_per_second:.1f}" if found.images_per_second else "-",
        f"{found.flops / 1e9:.2f}",
        f"{found.flops_per_second / 1e9:.1f}",
        f"{found.share_of_ceiling:.0%}" if found.share_of_ceiling is not None else "-",
        f"{found.peak_memory / 2**20:,.0f}",
    )


def line(cells: Sequence[str]) -> str:
    return f"{cells[0]:7}{cells[1]:21}" + "".join(f"{cell:>11}" for cell in cells[2:])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", choices=CONFIGS, default=["tiny"], help="sizes: the bundled model's, or published ones")
    add("--only", nargs="+", choices=ITEMS, default=list(ITEMS), help="what to measure (default: everything)")
    add("--batch_size", type=int, help="images a turn (default: 32; on a CPU 16 for tiny, 4 for the others)")
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
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    arguments = parser.parse_args()
    for name in ("batch_size", "repeats"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be 1 or more, got {value}")
    return arguments


if __name__ == "__main__":
    if "--plain" in sys.argv:
        main()  # with torch's own use of memory: `run` changes it
    else:
        run(main)
