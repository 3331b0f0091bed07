"""On a GPU the same numbers come out as on a CPU: networks, tokens, samples, training, resuming, compiling.

`python3 -m pytest tests/test_cuda.py -rP` also prints what was measured beside each limit.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import scripts.pretokenize
import scripts.train_generator
from data.token_loader import evaluation_tokens
from data.transforms import EvalTransform
from modeling.maskgit import ImageBert, UViTBert
from modeling.modules.conv import ConvDecoder
from modeling.modules.group_norm import has_kernels, norm_silu
from modeling.networks.efficientnet import PACKAGE as LITE0_PACKAGE
from modeling.networks.perceptual import FrozenDepthwise
from modeling.one_d_piece import OneDPiece
from modeling.pixel_vqgan import PixelVQGAN
from scripts import evaluate_reconstruction
from tests import evaluation_data, generator_data
from tests.fill import assert_close, fill, image, integers
from tests.test_maskgit import CLASSES, SAMPLES, golden_inputs, small
from tests.test_tokenizer import published_config
from tests.training_runs import differences, job_config, make_images, run_and_resume, run_job
from utils import inference
from utils.config import save_config
from utils.evaluation.protocol import exact_arithmetic
from utils.inference import add_speed_arguments, largest_batch, prepared
from utils.paths import ROOT
from utils.training import loop
from utils.training.loop import make_accelerator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

CUDA = torch.device("cuda")
GOLDEN = ROOT / "tests" / "golden"
TOLERANCE = 1e-3  # of the golden numbers, which a CPU meets to 2e-4
JOBS = ("teacher", "stage1", "stage2")
SHORT = ("training.max_train_steps=3", "experiment.eval_every=0", "experiment.generate_every=0")


@pytest.fixture(autouse=True)
def exact():
    """No test inherits the precision of the one before: TF32 is off, and Accelerate knows of no precision yet."""
    exact_arithmetic()
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def repeatable():
    """Convolutions that give the same each time; the other kernels of networks this small do anyway."""
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture(scope="module")
def trained(repeatable, tmp_path_factory):
    """All three jobs, six steps each, and again from their third step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("trained")
    make_images(folder)
    for job in JOBS:
        run_and_resume(job, folder)
    return folder


@pytest.fixture(scope="module")
def garments():
    """The bundled tokenizer on the CPU, and ten images (10, 3, 32, 32) for it."""
    model = OneDPiece.from_pretrained("one-d-piece_fashion")
    transform = EvalTransform(model.image_size)
    paths = sorted((ROOT / "assets/fashion").glob("*.png"))
    return model, torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]) / 255


def on_gpu(model):
    return model.to(CUDA).eval()


def asked(*arguments):
    parser = argparse.ArgumentParser()
    add_speed_arguments(parser)
    return parser.parse_args(arguments)


def losses_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/model" in line]


def drift(first: Path, second: Path, start: Path) -> float:
    """How far two final weights are apart, as a share of the way that training went from `start`."""
    ours, theirs, before = (load_file(path / "model.safetensors") for path in (first, second, start))
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    way = sum(float((ours[name] - before[name]).double().square().sum()) for name in ours)
    return math.sqrt(apart / way)


# Networks


def test_the_tokenizer_gives_the_published_numbers():
    golden = np.load(GOLDEN / "tokenizer_s256_stage2.npz")
    model = on_gpu(fill(OneDPiece(published_config()), 0))
    pixels = image(1, 2, 256, 256).to(CUDA)
    with torch.no_grad():
        assert_close(model.encoder(pixels, model.latent_tokens).cpu(), golden, "z", TOLERANCE)
        z_quantized, result = model.encode(pixels)
        clear = torch.from_numpy(golden["indices__margin"]) >= 1e-4
        assert clear.all()
        assert torch.equal(result["min_encoding_indices"].cpu(), torch.from_numpy(golden["indices"]))
        assert_close(z_quantized.cpu(), golden, "z_quantized", TOLERANCE)
        tokens = integers(7, "one-d-piece_s256", (2, 256), 0, 4096).to(CUDA)
        for length in (1, 7, 64, 256):
            images = model.decode_tokens(tokens, length=length)
            assert_close(images.cpu(), golden, f"decode_tokens[{length}]", TOLERANCE)
        # One length an image takes another attention kernel, with a mask.
        uneven = model.decode_tokens(tokens, length=[7, 64])
        for index, length in enumerate((7, 64)):
            expected = model.decode_tokens(tokens[index : index + 1], length=length)[0]
            torch.testing.assert_close(uneven[index], expected, rtol=1e-3, atol=1e-3)


def test_the_teacher_gives_the_published_numbers():
    golden = np.load(GOLDEN / "maskgit_vqgan.npz")
    model = on_gpu(fill(PixelVQGAN(published_config()), 0))
    pixels = image(1, 2, 256, 256).to(CUDA)
    with torch.no_grad():
        assert_close(model.encoder(pixels).cpu(), golden, "hidden", TOLERANCE)
    clear = torch.from_numpy(golden["codes__margin"]) >= 1e-4
    assert clear.float().mean() > 0.99
    assert torch.equal(model.encode(pixels).cpu()[clear], torch.from_numpy(golden["codes"])[clear])
    codes = integers(8, "vqgan", (2, 256), 0, 1024).to(CUDA)
    assert_close(model.decode(codes).cpu(), golden, "decode", TOLERANCE)


@pytest.mark.parametrize("network, file", [(ImageBert, "bert_small"), (UViTBert, "uvit_small")])
def test_the_generators_give_the_published_numbers(network, file):
    golden = np.load(GOLDEN / f"{file}.npz")
    ids, classes = golden_inputs()
    with torch.no_grad():
        logits = on_gpu(small(network))(ids.to(CUDA), classes.to(CUDA), 0.0)
    assert_close(logits.cpu(), golden, "logits[drop=0.0]", TOLERANCE)


def test_tokens_are_those_of_a_cpu_and_half_precision_decodes_them_closely(garments):
    model, images = garments
    tokens = model.encode(images)[1]["min_encoding_indices"]
    with torch.no_grad():
        expected = model.decode_tokens(tokens)
    model = on_gpu(model)
    try:
        arithmetic = prepared(asked("--precision", "bf16"), model)
        with torch.no_grad():
            assert torch.equal(model.encode(images.to(CUDA))[1]["min_encoding_indices"].cpu(), tokens)
            full = model.decode_tokens(tokens.to(CUDA)).cpu()
            with arithmetic():
                half = model.decode_tokens(tokens.to(CUDA)).cpu()
            with prepared(asked("--precision", "tf32"), model)():
                same = model.encode(images.to(CUDA))[1]["min_encoding_indices"].cpu() == tokens
    finally:
        model.to("cpu")
    torch.testing.assert_close(full, expected, rtol=1e-3, atol=1e-3)
    error = (half.float() - expected).abs()
    print(f"bf16 changes pixels by {float(error.mean()):.2e} on average and {float(error.max()):.2e} at most")
    print(f"TF32 keeps {float(same.float().mean()):.1%} of the tokens")
    assert half.dtype == torch.bfloat16 and 0 < error.mean() < 0.01


# Our kernels, and what is replayed


def close(found, expected, tolerance=1e-2):
    found, expected = found.detach().double(), expected.detach().double()
    assert float((found - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 128, 33, 31), (2, 512, 16, 16), (1, 256, 1, 1), (2, 32, 256, 255)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_group_norm_with_silu_is_that_of_torch_forward_and_backward(shape, dtype, layout):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32 if shape[2] > 1 else 8, shape[1], eps=1e-6, device=CUDA)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = (3 + torch.randn(shape, device=CUDA)).to(dtype).contiguous(memory_format=layout).requires_grad_()
    assert has_kernels(x.device)
    y = norm_silu(x, norm)
    gradient = torch.randn(shape, device=CUDA, dtype=dtype)
    found = [y, *torch.autograd.grad(y, [x, *norm.parameters()], gradient)]
    exact = [one.detach().double().requires_grad_() for one in (x, *norm.parameters())]
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(exact[0], norm.num_groups, *exact[1:], eps=1e-6))
    for one, goal in zip(found, [expected, *torch.autograd.grad(expected, exact, gradient.double())], strict=True):
        close(one, goal, 1e-4 if dtype == torch.float32 else 1e-2)
    assert y.dtype == dtype and found[2].dtype == torch.float32


def test_a_pixel_decoder_in_half_precision_has_the_gradients_of_float32():
    torch.manual_seed(0)
    sizes = {"channels": 32, "channel_multipliers": [1, 2], "num_res_blocks": 1, "latent_channels": 8}
    decoder, z = ConvDecoder(**sizes, norm_groups=8).to(CUDA), torch.randn(2, 8, 16, 16, device=CUDA)
    gradients = []
    for enabled in (False, True):
        with torch.autocast(CUDA.type, dtype=torch.bfloat16, enabled=enabled):
            images = decoder(z).float()
        gradients.append(torch.autograd.grad(images.square().mean(), list(decoder.parameters())))
    for half, full in zip(*reversed(gradients), strict=True):
        close(half, full, 0.05)


def test_the_gradient_of_a_frozen_depthwise_convolution_is_that_of_torch():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(96, 96, 7, padding=3, groups=96, device=CUDA).requires_grad_(False)
    frozen, x = FrozenDepthwise(layer), torch.randn(2, 96, 14, 14, device=CUDA, requires_grad=True)
    gradient = torch.randn_like(x)
    found, expected = (torch.autograd.grad(one(x), x, gradient)[0] for one in (frozen, layer))
    close(found, expected, 1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_blocks_give_what_they_would_give_for_every_input_and_for_new_weights(precision):
    model = on_gpu(OneDPiece.from_pretrained("one-d-piece_fashion"))
    replayed = copy.deepcopy(model)
    arithmetic = prepared(asked("--no-compile", "--precision", precision), replayed)

    def compare(mode):
        for seed, length in enumerate((4, 32, 4, 32, 4, 32, 4, 32)):
            torch.manual_seed(seed)
            tokens = torch.randint(model.codebook_size, (2, 1, 32), device=CUDA)
            with mode(), arithmetic():
                found, expected = (one.decode_tokens(tokens, length=length) for one in (replayed, model))
            close(found, expected)

    compare(torch.inference_mode)
    compare(torch.no_grad)
    with torch.no_grad():
        for one in (model, replayed):
            for name, weight in one.named_parameters():
                if name.endswith("weight"):
                    weight.mul_(1.1)
    compare(torch.no_grad)
    blocks = [*replayed.decoder.transformer, *replayed.pixel_decoder.up]
    assert all(callable(replay) for block in blocks for replay in block.forward.replays.values())


# Sampling


def test_greedy_samples_are_the_published_ones():
    key = "power-cosine_4.5_8"
    settings = {"guidance_decay": "power-cosine", "guidance_scale": 4.5, "num_sample_steps": 8}
    tokens = on_gpu(small()).generate(torch.tensor(CLASSES), randomize_temperature=0, **settings)
    clear = SAMPLES[f"{key}__margin"] >= 5e-4
    np.testing.assert_array_equal(tokens.cpu().numpy()[clear], SAMPLES[key][clear])


def test_a_seed_repeats_its_sample():
    model = on_gpu(ImageBert.from_pretrained("maskgit_fashion"))
    first, again = (model.generate(torch.arange(10), seeds=range(10)) for _ in range(2))
    other = model.generate(torch.arange(10), seeds=range(10, 20))
    assert first.device.type == CUDA.type and first.min() >= 0 and first.max() < model.codebook_size
    assert torch.equal(first, again) and not torch.equal(first, other)
    with torch.autocast(CUDA.type, dtype=torch.bfloat16):
        assert model.generate(torch.arange(10), seeds=range(10)).shape == first.shape


# Training


@pytest.mark.parametrize("job", JOBS)
def test_three_steps_and_three_more_equal_six(trained, job):
    straight, resumed = trained / job, trained / f"{job}-resumed"
    share = drift(
        straight / "checkpoint-6/unwrapped_model",
        resumed / "checkpoint-6/unwrapped_model",
        straight / "checkpoint-3/unwrapped_model",
    )
    different = differences(straight, resumed)
    print(f"{job}: {len(different)} tensors differ, by {share:.1e} of the way of three steps")
    if job == "stage1":
        assert different == []
    else:
        # The adversary's pooling adds up gradients in any order where it enlarges, as it does for such small images.
        assert share < 0.02


def test_training_is_that_of_a_cpu(trained, tmp_path, monkeypatch):
    """The first losses; later ones depend on what each kind of device draws."""
    monkeypatch.setattr("utils.training.loop.pick_device", lambda: torch.device("cpu"))
    run_job("teacher", trained, tmp_path / "cpu", *SHORT, "experiment.log_every=1")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.undo()
    run_job("teacher", trained, tmp_path / "gpu", *SHORT, "experiment.log_every=1", "training.enable_tf32=False")
    for ours, theirs in zip(losses_of(tmp_path / "gpu"), losses_of(tmp_path / "cpu"), strict=True):
        assert ours["loss/model"] == pytest.approx(theirs["loss/model"], rel=1e-2)
        assert ours["grad_norm/model"] == pytest.approx(theirs["grad_norm/model"], rel=5e-2)


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_is_on_or_off_in_convolutions_and_matrix_products_alike(tmp_path, enabled):
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for backend in backends:
        backend.allow_tf32 = not enabled
    make_accelerator(job_config("teacher", tmp_path, tmp_path, f"training.enable_tf32={enabled}"))
    assert [backend.allow_tf32 for backend in backends] == [enabled, enabled]


@pytest.mark.parametrize("tail_drop", ["per_sample", "prefix_to_full"])
def test_tail_drops_train_in_bfloat16(trained, tmp_path, tail_drop):
    drop = f"model.vq_model.tail_drop={tail_drop}"
    run_job("stage1", trained, tmp_path / "run", *SHORT, drop, "training.mixed_precision=bf16")
    last = losses_of(tmp_path / "run")[-1]
    assert all(math.isfinite(value) for value in last.values())
    assert ("prefix_loss" in last) == (tail_drop == "prefix_to_full")


def test_an_adversary_trains_in_half_precision(trained, tmp_path):
    for precision in ("bf16", "fp16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run_job("stage2", trained, tmp_path / precision, *SHORT, f"training.mixed_precision={precision}")
        assert math.isfinite(losses_of(tmp_path / precision)[-1]["loss/discriminator"])


def test_a_generator_trains_and_resumes_exactly_on_tokens_that_are_those_of_a_cpu(repeatable, tmp_path, monkeypatch):
    folder = generator_data.make_world(tmp_path)
    config = folder / "generator.yaml"
    save_config(generator_data.small_config(folder, "training.enable_tf32=False"), config)
    for device in ("cpu", CUDA.type):
        place = ("--output_dir", folder / device, "--device", device)
        generator_data.call(monkeypatch, scripts.pretokenize.main, "--config", config, *place)
    sets = (
        generator_data.small_config(folder, f"dataset.params.token_set={folder / device}")
        for device in ("cpu", CUDA.type)
    )
    for theirs, ours in zip(*(evaluation_tokens(one, rank=0, world_size=1) for one in sets), strict=True):
        assert torch.equal(ours["tokens"], theirs["tokens"])

    def train(output_dir, kind):
        overrides = (f"dataset.type={kind}", f"dataset.params.token_set={folder}/{CUDA.type}")
        output = f"experiment.output_dir={output_dir}"
        generator_data.call(monkeypatch, scripts.train_generator.main, f"config={config}", *overrides, output)

    for kind in ("shards", "tokens"):
        train(folder / kind, kind)
        (folder / f"{kind}-resumed").mkdir()
        (folder / kind / "checkpoint-3").rename(folder / f"{kind}-resumed" / "checkpoint-3")
        train(folder / f"{kind}-resumed", kind)
        assert differences(folder / kind, folder / f"{kind}-resumed") == []


# Speed


@pytest.mark.parametrize("job", JOBS)
def test_a_training_step_does_not_wait_for_the_gpu(trained, tmp_path, monkeypatch, job):
    update, watched = loop.update, 3  # at the even ones, codes are moved

    def update_watched(run, micro_batches):
        torch.cuda.set_sync_debug_mode("error" if run.step == watched else "default")
        try:
            return update(run, micro_batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "update", update_watched)
    options = ("training.mixed_precision=bf16", "training.max_train_steps=4", "model.vq_model.tail_drop=per_sample")
    run_job(job, trained, tmp_path / "run", *SHORT, *(options if job != "teacher" else options[:2]))


def test_the_largest_batch_is_found_and_the_memory_given_back(garments, monkeypatch):
    monkeypatch.setattr(inference, "LARGEST_BATCH", 64)
    model, images = garments[0], garments[1][:1].to(CUDA)
    model = on_gpu(model)
    try:
        with torch.no_grad():
            assert largest_batch(lambda size: model(images.expand(size, -1, -1, -1)), CUDA) > 1
    finally:
        model.to("cpu")
    limit = 2**32  # bytes, so that nobody else on this GPU is short of memory
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    monkeypatch.setattr(inference, "LEAST_GAIN", 0)  # memory alone decides
    try:
        assert largest_batch(lambda size: torch.empty(size * (limit // 5), dtype=torch.uint8, device=CUDA), CUDA) == 4
        assert torch.cuda.memory_reserved() < limit // 5
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Evaluation


def test_a_tokenizer_scores_as_on_a_cpu(tmp_path, monkeypatch, capsys):
    pytest.importorskip(LITE0_PACKAGE)
    config = evaluation_data.make_world(tmp_path) / "config.yaml"
    rows = []
    for device in ("cpu", CUDA.type):
        place = ("--config", config, "--device", device, "--output_dir", tmp_path / f"scores-{device}")
        options = ("--features", "efficientnet_lite0", "--lengths", "2,8")
        status, _, error = evaluation_data.command(monkeypatch, capsys, evaluate_reconstruction.main, *place, *options)
        assert status == 0, error
        results = json.loads((tmp_path / f"scores-{device}/metrics.json").read_text())
        rows.append(results["rows"])
    for theirs, ours in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, rel=1e-2) if isinstance(value, float) else value)


# Compiling: last, because it takes longest


def test_compiled_training_has_the_losses_of_eager_training(trained, tmp_path):
    options = (*SHORT, "experiment.log_every=1", "training.enable_tf32=False")
    run_job("stage1", trained, tmp_path / "eager", *options)
    run_job("stage1", trained, tmp_path / "compiled", *options, "training.compile=True")
    for ours, theirs in zip(losses_of(tmp_path / "compiled"), losses_of(tmp_path / "eager"), strict=True):
        assert ours["loss/model"] == pytest.approx(theirs["loss/model"], rel=1e-3)
        assert ours["grad_norm/model"] == pytest.approx(theirs["grad_norm/model"], rel=1e-2)


def test_a_compiled_tokenizer_gives_the_same_images(garments):
    images = garments[1].to(CUDA)
    plain, compiled = (on_gpu(OneDPiece.from_pretrained("one-d-piece_fashion")) for _ in range(2))
    arithmetic = prepared(asked("--compile"), compiled)
    with torch.no_grad(), arithmetic():
        tokens = plain.encode(images)[1]["min_encoding_indices"]
        same = (compiled.encode(images)[1]["min_encoding_indices"] == tokens).float().mean()
        print(f"{float(same):.1%} of the tokens stay the same when compiled")
        assert same > 0.99
        for length in (4, 32):
            expected = plain.decode_tokens(tokens, length=length)
            torch.testing.assert_close(compiled.decode_tokens(tokens, length=length), expected, rtol=1e-3, atol=1e-3)
