"""What scripts/benchmark.py times of the networks: an item is a function that builds its works."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from modeling.contribution import replacement_changes
from modeling.modules import blocks, conv
from modeling.titok import TiTok
from modeling.tokenizers import build_tokenizer
from utils.benchmark.items import RECOMMENDED, Setting, Work, allow_tf32
from utils.benchmark.measure import Product


def tokenizer(setting: Setting, config: DictConfig) -> TiTok:
    return setting.prepared(build_tokenizer(config))


def encode(setting: Setting) -> Iterator[Work]:
    config = setting.config("stage2")
    model = tokenizer(setting, config)
    images = setting.images(config)

    @torch.no_grad()
    def turn():
        with setting.autocast():
            return model.encode(images)

    yield Work("encode", turn, len(images))


def decode(setting: Setting) -> Iterator[Work]:
    config = setting.config("stage2")
    model = tokenizer(setting, config)
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
    num_heads = encoder.num_heads
    num_patches, width = encoder.positional_embedding.shape  # and the class token
    positions = num_patches + encoder.latent_token_positional_embedding.shape[0]
    # In memory as a block's packed projection leaves them: the layout is part of the cost.
    shape = (setting.batch_size, positions, 3, num_heads, width // num_heads)
    packed = torch.randn(shape, device=setting.device, dtype=setting.dtype, requires_grad=True)
    for name, function in (("attention", blocks.attention), ("attention, fused", F.scaled_dot_product_attention)):

        def turn(function=function):
            output = function(*packed.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)  # (B, T, W)
            return torch.autograd.grad(output, packed, output.detach())

        yield Work(name, turn, setting.batch_size)


def compare_precisions(setting: Setting) -> Iterator[Work]:
    """A linear layer and a convolution in float32 and in bfloat16, which a processor may only emulate."""
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        kind: dict[str, Any] = {"device": setting.device, "dtype": dtype}
        x, weight = torch.randn(1500, 192, **kind), torch.randn(768, 192, **kind)
        yield Work(f"linear layer, {name}", partial(F.linear, x, weight))
        images = torch.randn(1, 128, 64, 64, **kind).contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(128, 128, 3, 3, **kind).contiguous(memory_format=torch.channels_last)
        yield Work(f"convolution, {name}", partial(F.conv2d, images, kernel, padding=1))


def contribute(setting: Setting) -> Iterator[Work]:
    """Images in which one token is replaced: a batch at once, and one token at a time; an image is such an image."""
    model = tokenizer(setting, setting.config("stage2"))
    tokens = torch.randint(model.codebook_size, (1, model.num_latent_tokens), device=setting.device)
    codes = torch.randint(model.codebook_size, (1, setting.batch_size, 1), device=setting.device)
    for name, batch_size in (("contribution", setting.batch_size), ("contribution, 1 by 1", 1)):

        def turn(batch_size=batch_size):
            with setting.autocast():
                for _ in replacement_changes(model, tokens, codes, batch_size):
                    pass

        yield Work(name, turn, setting.batch_size)


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


def drafts(setting: Setting) -> Iterator[Work]:
    """The first tokens alone of images, by the config's sampler, for each of the lengths that the model has."""
    from modeling.maskgit import generator_class
    from modeling.samplers.settings import sampler_settings

    config = setting.config("generator")
    model = setting.prepared(generator_class(config)(config))
    labels = torch.randint(model.num_classes, (setting.batch_size,)).to(setting.device)
    for length in sorted({min(length, model.num_tokens) for length in setting.lengths}):
        options = asdict(sampler_settings(config, num_tokens=length))

        def turn(options=options):
            with setting.autocast():
                return model.generate(labels, **options)

        yield Work(f"draft, {length} tokens", turn, setting.batch_size)


# ------------------------------------------------------------------------------------------- training


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
        config = setting.config("generator", f"experiment.output_dir={folder}", f"training.compile={setting.compile}")
        task = GeneratorTask(config)
        task.tokenizer = build_tokenizer(config).to(setting.device).eval().requires_grad_(False)
        task.frozen = [task.tokenizer]
        tokens = torch.randint(task.model.codebook_size, (setting.batch_size, task.model.num_tokens))
        labels = {"class_id": torch.randint(task.model.num_classes, (setting.batch_size,)).to(setting.device)}
        training = make_run(setting, config, task)
        for source, batch in (
            ("tokens", {"tokens": tokens.to(setting.device)}),
            ("images", {"image": setting.images(config)}),
        ):
            yield Work(f"generator, {source}", one_update(training, batch | labels), setting.batch_size)


def checkpoint(setting: Setting) -> Iterator[Work]:
    """A whole checkpoint: weights, EMA, optimiser state, checksums, flush; and a step, of which it is a share."""
    from utils.training.resume import save

    with tempfile.TemporaryDirectory() as folder:
        training, turn, num_images = tokenizer_step(setting, "stage1", folder)
        training.output_dir = training.processes.gather(training.output_dir)[0]  # one folder of all
        yield Work("step", turn, num_images)  # first, since the optimiser has no state before it
        yield Work("checkpoint", partial(save, training), every=training.config.experiment.save_every)


def tokenizer_step(setting: Setting, phase: str, folder: str, *overrides: str) -> tuple[Any, Callable[[], None], int]:
    """The training loop's own update of a tokenizer: the loop, one turn of it, the number of images."""
    from modeling.pixel_vqgan import PixelVQGAN
    from modeling.tasks.tokenizer import tokenizer_task

    # Without tail drop, whose draws would make every step another amount of work; the recommended one's do not.
    whole = ("model.type=titok", "model.vq_model.strict_length_assertion=False")
    config = setting.config(
        phase,
        f"experiment.output_dir={folder}",
        *(whole if setting.model != RECOMMENDED else ()),
        f"training.compile={setting.compile}",
        "training.codebook.warmup_steps=0",
        "training.codebook.kmeans=False",
        "training.codebook.restart_every=0",
        *overrides,
    )
    if phase == "stage1":
        task = tokenizer_task(config)
        task.teacher = PixelVQGAN(config).eval().requires_grad_(False)
        task.frozen = [task.teacher]
        step = 0
    else:
        task = stage2_task(config, folder)
        step = min(config.losses.discriminator_start, config.training.max_train_steps - 1)  # the adversary has joined
    training = make_run(setting, config, task)
    return training, one_update(training, {"image": setting.images(config)}, step), setting.batch_size


def stage2_task(config: DictConfig, folder: str) -> Any:
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
    task.frozen = [task.perceptual]
    return task


def make_run(setting: Setting, config: DictConfig, task: Any) -> Any:
    """The training loop around a task, in the setting's precision."""
    from accelerate import Accelerator

    from utils.training.run import Run

    mixed_precision = setting.precision if setting.precision in ("bf16", "fp16") else "no"
    if mixed_precision != "no":  # what autocast leaves in float32 is as in training
        allow_tf32(config.training.enable_tf32)
    return Run(task, config, Accelerator(mixed_precision=mixed_precision, cpu=setting.device.type == "cpu"))


def one_update(training: Any, batch: dict[str, Tensor], step: int = 0) -> Callable[[], None]:
    """A turn that does the update with index `step` on `batch`, again and again."""
    from utils.training.loop import update

    def turn():
        training.step = step
        update(training, [batch])

    return turn


# ------------------------------------------------------------------------------------------- our choices for speed


def products(setting: Setting) -> dict[str, Product]:
    """x W^T by the libraries that our networks call on the device in the precision."""
    found: dict[str, Product] = {"torch": F.linear}
    if setting.device.type == "cpu" and setting.dtype in blocks.ONEDNN_DTYPES:
        found["oneDNN"] = partial(blocks.onednn_linear, bias=None, gelu=False)
    return found


def compute_plainly() -> None:
    """Compute, for the rest of this process, without what our networks do for speed."""
    from modeling.networks import perceptual

    blocks.ONEDNN_DTYPES = ()
    conv.LAYOUT = torch.contiguous_format
    conv.norm_silu = lambda x, norm: F.silu(norm(x))
    conv._enlarged = lambda x, conv: conv(F.interpolate(x, scale_factor=2.0))
    perceptual.FrozenDepthwise.forward = perceptual.FrozenDepthwise.plainly
