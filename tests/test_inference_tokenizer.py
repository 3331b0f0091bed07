"""scripts/inference_tokenizer.py: what it writes and prints, and what it says about bad input."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from modeling import tokenizers
from modeling.checkpoints import WeightsError
from modeling.checkpoints import locate as locating
from modeling.checkpoints.published import PUBLISHED, TITOK_FILES
from modeling.one_d_piece import OneDPiece
from modeling.pixel_vqgan import PixelVQGAN
from modeling.tokenizers import default_lengths, load_tokenizer
from scripts import inference_tokenizer
from tests.fill import fill
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.paths import ROOT
from utils.result_folder import LIST
from utils.speed import cpu_has_bfloat16
from utils.tokens import read_tokens

SIDE, NUM_TOKENS, CODEBOOK = 16, 4, 32
MODEL = {
    "type": "one_d_piece",
    "vq_model": {
        "codebook_size": CODEBOOK,
        "token_size": 4,
        "vit_enc_model_size": "tiny",
        "vit_dec_model_size": "tiny",
        "vit_enc_patch_size": 4,
        "vit_dec_patch_size": 4,
        "num_latent_tokens": NUM_TOKENS,
    },
    "pixel_vqgan": {
        "channels": 32,
        "channel_multipliers": [1, 1, 1],
        "num_res_blocks": 1,
        "latent_channels": 8,
        "codebook_size": 16,
    },
}


def tokenizer(**vq_model):
    config = {"model": MODEL | {"vq_model": MODEL["vq_model"] | vq_model}}
    return fill(OneDPiece(config | {"dataset": {"preprocessing": {"crop_size": SIDE}}}), 0).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "model"
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """Three images of other sizes and kinds, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for name, shape in {"wide.png": (20, 50, 3), "tall.jpg": (64, 24, 3), "grey.png": (9, 9)}.items():
        Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def infer(tmp_path, checkpoint, monkeypatch, capsys):
    """Run the command in this process; returns (exit status, stdout, stderr, output folder)."""

    def infer(*arguments, **flags):
        out = tmp_path / "out"
        flags = {"checkpoint": checkpoint, "output_dir": out, "device": "cpu"} | flags
        argv = [f"--{name}={value}" for name, value in flags.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["inference_tokenizer.py", *argv, *map(str, arguments)])
        status = 0
        try:
            run(inference_tokenizer.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr(), out

    return infer


def is_one_sentence(error):
    return error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error


def test_it_writes_reconstructions_tokens_and_a_sheet(infer, images):
    status, printed, _, out = infer("--image", images)
    assert status == 0
    names = {f"{key}_{length}.png" for key in ("grey", "tall", "wide") for length in (1, 2, 4)}
    assert {path.name for path in out.iterdir()} == names | {"tokens.npz", "contact_sheet.png", LIST}
    stored = np.load(out / "tokens.npz", allow_pickle=False)
    assert stored["keys"].tolist() == ["grey", "tall", "wide"]
    assert stored["tokens"].shape == (3, NUM_TOKENS) and stored["tokens"].dtype == np.int64
    for index, key in enumerate(stored["keys"]):
        tokens = torch.from_numpy(stored["tokens"][index : index + 1])
        with torch.no_grad():
            pixels = tokenizer().decode_tokens(tokens, length=2)[0].clamp(0, 1).mul(255).round()
        written = torch.from_numpy(np.array(Image.open(out / f"{key}_2.png"))).permute(2, 0, 1)
        assert (pixels - written).abs().max() <= 1  # batched differently, so rounded differently now and then
    assert "3 of " in printed and "left out 1, such as notes.txt" in printed


def test_the_table_has_bytes_rate_and_quality_of_each_length(infer, images):
    _, printed, _, _ = infer("--image", images / "wide.png", lengths="4,1")
    rows = [line.split() for line in printed.splitlines() if re.fullmatch(r"[\d.\s-]+", line) and line.strip()]
    bits = math.log2(CODEBOOK)
    assert [row[:3] for row in rows] == [
        [str(length), str(math.ceil(length * bits / 8)), f"{length * bits / SIDE**2:.4f}"] for length in (1, 4)
    ]
    assert all(0 < float(row[3]) < 60 and -1 <= float(row[4]) <= 1 for row in rows)


def test_a_folder_that_is_input_and_output_does_not_feed_on_its_results(infer, images):
    for _ in range(2):
        status, printed, _, _ = infer("--image", images, output_dir=images)
        assert status == 0 and "3 of " in printed
        assert np.load(images / "tokens.npz")["keys"].tolist() == ["grey", "tall", "wide"]


def test_a_folder_holds_the_results_of_one_run_alone_and_what_others_put_there(infer, images):
    _, _, _, out = infer("--image", images)
    (out / "mine_1.png").write_bytes(b"")
    infer("--image", images / "nowhere")  # a run that writes nothing removes nothing
    assert (out / "wide_4.png").exists()
    infer("--image", images / "wide.png", lengths="2")
    results = {"wide_2.png", "tokens.npz", "contact_sheet.png", LIST}
    assert {path.name for path in out.iterdir()} == results | {"mine_1.png"}


def test_images_of_one_name_keep_apart(infer, images):
    status, _, _, out = infer("--image", images / "wide.png", images, images / "wide.png", lengths="1")
    assert status == 0
    assert np.load(out / "tokens.npz")["keys"].tolist() == ["wide", "grey", "tall", "wide-2", "wide-3"]
    assert len(list(out.glob("wide*_1.png"))) == 3


def test_images_are_taken_as_a_viewer_shows_them(infer, tmp_path):
    """Transparency on white, photographs upright; the tokens are those of the image that one sees."""
    draws = np.random.default_rng(1)
    pixels = draws.integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(np.arange(SIDE) < SIDE // 2, 255, 0)
    seen = pixels[..., :3].copy()
    seen[:, SIDE // 2 :] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "transparent.png")
    Image.fromarray(seen).save(tmp_path / "seen.png")
    Image.fromarray(seen[::-1, ::-1]).save(tmp_path / "turned.png", exif=exif)
    names = [tmp_path / f"{name}.png" for name in ("seen", "transparent", "turned")]
    out = infer("--image", *names, lengths="1")[-1]
    saved = read_tokens(out / "tokens.npz")
    assert np.array_equal(saved.tokens[1], saved.tokens[0]) and np.array_equal(saved.tokens[2], saved.tokens[0])
    assert "transparency on white, upright by EXIF" in saved.about["preparation"]


def test_batches_do_not_show(infer, images):
    tokens = []
    for batch_size in (1, 2):
        out = infer("--image", images, batch_size=batch_size, lengths="1")[-1]
        tokens.append(np.load(out / "tokens.npz")["tokens"])
    assert np.array_equal(*tokens)


def test_half_precision_changes_images_a_little_and_tokens_never(infer, images):
    out = infer("--image", images)[-1]
    tokens, whole = np.load(out / "tokens.npz")["tokens"], np.asarray(Image.open(out / "wide_4.png")).astype(int)
    status, _, warning, _ = infer("--image", images, precision="bf16", batch_size="auto")
    assert status == 0 and cpu_has_bfloat16() != warning.startswith("warning: --precision bf16 is emulated")
    assert np.array_equal(np.load(out / "tokens.npz")["tokens"], tokens)
    assert 0 < np.abs(np.asarray(Image.open(out / "wide_4.png")) - whole).mean() < 8


@pytest.mark.long  # the compiler takes half a minute
def test_the_compiled_model_gives_the_same(infer):
    scores = []
    for flags in ([], ["--compile"]):
        image = ROOT / "assets/fashion/bag.png"
        status, printed, _, _ = infer("--image", image, *flags, checkpoint=None, lengths="8")
        assert status == 0
        scores.append(re.findall(r"[\d.]+", printed.partition("PSNR (dB)     SSIM")[2].partition("contact")[0]))
    assert len(scores[0]) == 5
    np.testing.assert_allclose(*np.array(scores, dtype=float), atol=0.02)


def test_of_many_images_the_seed_draws_those_on_the_sheet(infer, tmp_path, monkeypatch):
    monkeypatch.setattr(inference_tokenizer, "MOST_SHOWN", 2)
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (SIDE, SIDE), (50 * index, 0, 0)).save(folder / f"{index}.png")
    sheets = []
    for seed in (1, 1, 2):
        status, printed, _, out = infer("--image", folder, seed=seed, lengths="1")
        assert status == 0 and "2 of 5 images" in printed and "of each image" not in printed
        sheets.append((out / "contact_sheet.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_a_broken_image_in_a_folder_is_skipped_and_named(infer, images):
    whole = (images / "wide.png").read_bytes()
    (images / "broken.png").write_bytes(whole[: len(whole) // 2])
    status, printed, error, out = infer("--image", images, lengths="1")
    assert status == 0 and "mean over 3 images" in printed
    assert "skipped 1 broken image" in error and "broken.png" in error
    assert len(np.load(out / "tokens.npz")["keys"]) == 3


def test_broken_images_have_their_own_reasons_and_leave_their_places_on_the_sheet(infer, images, monkeypatch):
    monkeypatch.setattr(inference_tokenizer, "MOST_SHOWN", 3)
    whole = (images / "wide.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    (images / "empty.png").write_bytes(b"")
    for seed in range(4):
        status, printed, error, _ = infer("--image", images, lengths="1", seed=seed)
        assert status == 0 and "drawn by --seed" not in printed
        assert (
            "skipped 2 broken images: " in error and "cut.png (" in error and "; " in error and "empty.png (" in error
        )


def test_a_broken_image_that_was_named_is_an_error_after_the_others_are_done(infer, images):
    status, _, error, out = infer("--image", images / "notes.txt", images / "wide.png", lengths="1")
    assert status == 1 and is_one_sentence(error) and "notes.txt" in error
    assert (out / "wide_1.png").is_file() and (out / "contact_sheet.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "flags", "message"),
    [
        (["--image", "nowhere.png"], {}, "--image nowhere.png is neither a file nor a folder"),
        (["--image", "{tmp}"], {}, "is a folder without images"),
        (["--image", "{tmp}/notes.txt"], {}, "none of the 1 images can be used; 1 broken image: "),
        ([], {"lengths": "1,x"}, "--lengths takes whole numbers such as 1,4,16, got 1,x"),
        ([], {"lengths": "1,5"}, "--lengths must be in 1..4, got 5"),
        ([], {"lengths": "0"}, "--lengths must be 1 or more, got 0"),
        ([], {"device": "toaster"}, "--device toaster cannot be used here"),
        ([], {"output_dir": "{tmp}/notes.txt"}, "notes.txt (File exists): a file is where a folder is needed"),
        ([], {"checkpoint": "nowhere/at/all"}, "no checkpoint nowhere/at/all"),
        ([], {"checkpoint": "7"}, "checkpoint 7 is a step number, which needs the output folder"),
        ([], {"config": "configs/eval/nothing.yaml"}, "configs/eval/nothing.yaml does not exist"),
    ],
)
def test_bad_input_is_explained_in_one_sentence(infer, tmp_path, arguments, flags, message):
    (tmp_path / "notes.txt").write_text("no image")
    status, _, error, out = infer(
        *(text.format(tmp=tmp_path) for text in arguments),
        **{name: value.format(tmp=tmp_path) for name, value in flags.items()},
    )
    assert status == 1 and is_one_sentence(error) and message in error, error
    assert not list(out.glob("*.png"))


def test_stage_1_weights_are_refused(infer, tmp_path):
    tokenizer(finetune_decoder=False).save_pretrained(tmp_path / "stage1")
    status, _, error, _ = infer(checkpoint=tmp_path / "stage1")
    assert status == 1 and is_one_sentence(error) and "stage-1 weights" in error


def test_colour_is_noted_where_the_bundled_model_sees_it(infer, images, checkpoint, monkeypatch):
    monkeypatch.setattr(locating, "BUNDLED", {"one-d-piece_fashion": checkpoint})
    note = "has seen nothing but grey garments"
    assert note in infer("--image", images / "wide.png", checkpoint=None)[1]
    assert note not in infer("--image", images / "grey.png", checkpoint=None)[1]


def test_a_photograph_is_noted_where_the_emoji_model_sees_it(infer, tmp_path):
    photograph, emoji = ROOT / "assets/photos/chelsea.png", ROOT / "assets/emoji"
    note = "one-d-piece_emoji has seen nothing but emoji on white, and chelsea is not on white"
    flags = {"checkpoint": "one-d-piece_emoji", "lengths": "8"}
    printed = infer("--image", photograph, emoji, **flags)[1]
    assert note in printed and "more are" not in printed and "(bundled, trained on emoji)" in printed
    assert "has seen nothing but" not in infer("--image", emoji, **flags)[1]


def test_help_comes_with_an_example():
    command = [sys.executable, ROOT / "scripts/inference_tokenizer.py", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "python3 scripts/inference_tokenizer.py --image assets/fashion" in result.stdout
    flags = ("image", "config", "checkpoint", "lengths", "output_dir", "device", "seed", "batch_size")
    assert all(f"--{flag}" in result.stdout for flag in flags)


# Which weights a configuration and a checkpoint mean


def run_config(output_dir, init_weight=""):
    return {
        "experiment": {"output_dir": str(output_dir), "init_weight": init_weight},
        "model": MODEL,
        "dataset": {"preprocessing": {"crop_size": SIDE}},
    }


@pytest.fixture
def write_config(tmp_path):
    def write_config(**values):
        OmegaConf.save(OmegaConf.create(run_config(**values)), tmp_path / "run.yaml")
        return tmp_path / "run.yaml"

    return write_config


def test_a_configurations_own_run_comes_before_its_published_model(write_config, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(locating, "BUNDLED", {"published": checkpoint})
    output_dir = tmp_path / "runs"
    config = write_config(output_dir=output_dir, init_weight="published")
    assert load_tokenizer(config)[1].weights.parent == checkpoint
    output_dir.mkdir()
    (output_dir / "metrics.jsonl").touch()  # begun, and nothing saved yet
    assert load_tokenizer(config)[1].weights.parent == checkpoint
    tokenizer().save_pretrained(output_dir / "checkpoint-20" / "ema_model")
    assert load_tokenizer(config)[1].weights.parents[1] == output_dir / "checkpoint-20"
    tokenizer().save_pretrained(output_dir)
    assert load_tokenizer(config)[1].weights.parent == output_dir
    assert load_tokenizer(config, "20")[1].weights.parents[1] == output_dir / "checkpoint-20"
    assert load_tokenizer(config, checkpoint)[1].weights.parent == checkpoint


def test_what_training_starts_from_is_not_what_a_configuration_makes(write_config, tmp_path, checkpoint):
    config = write_config(output_dir=tmp_path / "runs", init_weight=str(checkpoint))
    with pytest.raises(WeightsError, match="no weights for this configuration.*train it first, or give a checkpoint"):
        load_tokenizer(config)


def test_every_published_evaluation_names_its_published_weights():
    for path in (ROOT / "configs/eval").glob("*.yaml"):
        named = load_config(path).experiment.init_weight
        relative = str(path.relative_to(ROOT))
        assert (PUBLISHED | TITOK_FILES).get(named) == relative
    assert load_config(ROOT / "configs/fashion/eval.yaml").experiment.init_weight == tokenizers.BUNDLED_TOKENIZER


def test_lengths_double_up_to_all_tokens():
    assert default_lengths(tokenizer()) == [1, 2, 4]
    assert default_lengths(tokenizer(num_latent_tokens=5)) == [1, 2, 4, 5]
    assert default_lengths(tokenizer(num_latent_tokens=1)) == [1]
    assert default_lengths(tokenizer(strict_length_assertion=True)) == [NUM_TOKENS]


def test_a_pixel_vqgan_is_no_tokenizer(tmp_path):
    PixelVQGAN({"model": MODEL | {"type": "pixel_vqgan"}}).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="is a teacher; give a tokenizer. It holds a PixelVQGAN, not a TiTok"):
        load_tokenizer(checkpoint=tmp_path / "teacher")
