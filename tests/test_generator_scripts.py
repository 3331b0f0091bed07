"""The commands that generate images: what they write, and that it follows from seed, class and number alone."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.inference_generator
import scripts.sample_imagenet
from modeling import generators, sampled_set
from modeling.checkpoints import WeightsError
from modeling.checkpoints.locate import Located, locate
from modeling.checkpoints.published import BUNDLED
from modeling.identity import has_mean_code, identity
from modeling.maskgit import ImageBert
from tests.apple_gpu import AppleGPU
from tests.fill import fill
from tests.generator_data import NUM_TOKENS, call, make_world, on_two_processes, small_config
from utils.class_names import parse_labels
from utils.errors import UserError
from utils.images import to_pil
from utils.paths import ROOT
from utils.tokens import read_tokens


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A generator that samples with much noise, so that its images differ, as published.

    All of its codes are about as likely, so that with top-p rounding would decide which of them are left.
    """
    folder = make_world(tmp_path_factory.mktemp("world"))
    settings = ("sampler=confidence", "top_p=1.0", "randomize_temperature=30")
    noisy = small_config(folder, *(f"model.generator.{setting}" for setting in settings))
    fill(ImageBert(noisy), 0).save_pretrained(folder / "generator")
    return folder


@pytest.fixture
def generate(world, tmp_path, monkeypatch):
    """Run inference_generator.py on the small generator; returns the output folder."""

    def generate(*arguments, output="out"):
        place = ("--checkpoint", world / "generator", "--device", "cpu", "--output_dir", tmp_path / output)
        call(monkeypatch, scripts.inference_generator.main, *place, *arguments)
        return tmp_path / output

    return generate


@pytest.fixture
def sample(world, tmp_path, monkeypatch):
    """Run sample_imagenet.py on the small generator, in parts of 8 images; returns the output folder."""
    monkeypatch.setattr(sampled_set, "IMAGES_PER_PART", 8)

    def sample(*arguments, output="samples"):
        place = ("--checkpoint", world / "generator", "--device", "cpu", "--output_dir", tmp_path / output)
        call(monkeypatch, scripts.sample_imagenet.main, *place, *arguments)
        return tmp_path / output

    return sample


def test_a_class_is_meant_by_its_name_before_its_number():
    names = sorted(map(str, range(1, 13)))  # 1, 10, 11, 12, 2, ...
    assert [names[label] for label in parse_labels(["2", "10", "12"], names)] == ["2", "10", "12"]
    assert parse_labels(["0"], names) == [0]
    assert parse_labels(["Cat", "cat"], ["Cat", "cat"]) == [0, 1]
    assert parse_labels(["DOG", "1"], ["cat", "dog"]) == [1]
    with pytest.raises(UserError, match="^--label takes a class, a number in 0..1 or one of cat, dog, got 'cow'"):
        parse_labels(["cow"], ["cat", "dog"], "--label")


def test_images_are_sampled_without_float64_on_the_device(generate, sample):
    with AppleGPU():
        folder, samples = generate("--num_images", 1, "--lengths", "2"), sample("--num_images", 10)
    assert (folder / "grid.png").is_file() and (samples / "samples.npz").is_file()


def pixels(path):
    return np.asarray(Image.open(path))


def test_the_grid_has_a_row_a_class_and_a_column_a_sample(generate, capsys):
    folder = generate("--num_images", 3, "--lengths", "1,2", 8)
    files = {path.name for path in folder.iterdir()}
    assert {"grid.png", "lengths.png", "tokens.npz", "0_t-shirt-top_000.png", "9_ankle-boot_002.png"} <= files
    assert len(files) == 3 + 30 + 1  # the list of them
    assert pixels(folder / "0_t-shirt-top_000.png").shape == (8, 8, 3)
    saved = np.load(folder / "tokens.npz")
    assert saved["tokens"].shape == (30, NUM_TOKENS)
    assert saved["labels"].tolist() == [label for label in range(10) for _ in range(3)]
    assert saved["samples"].tolist() == [0, 1, 2] * 10
    assert saved["keys"].tolist()[4] == "1_trouser_001"
    about = read_tokens(folder / "tokens.npz").about
    assert (about["seed"], about["sampler"]["num_sample_steps"]) == (42, 3) and "tokenizer" in about
    tile = 96
    height, width, _ = pixels(folder / "grid.png").shape
    assert height > 10 * tile and 3 * tile < width < 5 * tile
    out = capsys.readouterr().out
    assert str(folder / "grid.png") in out and "num_sample_steps 3" in out


def test_an_image_does_not_depend_on_the_others(generate):
    alone = generate("--labels", "Dress", "--num_images", 1, "--no-grid", output="alone")
    assert not (alone / "grid.png").exists()
    among = generate("--labels", 5, "dress", "ANKLE BOOT", "--num_images", 4, "--batch_size", 5, output="among")
    assert np.array_equal(pixels(alone / "3_dress_000.png"), pixels(among / "3_dress_000.png"))
    other = generate("--labels", 3, "--num_images", 1, "--seed", 1, output="other")
    assert not np.array_equal(pixels(alone / "3_dress_000.png"), pixels(other / "3_dress_000.png"))
    tokens = np.load(among / "tokens.npz")["tokens"]
    assert len(np.unique(tokens, axis=0)) == 12


def test_like_a_file_repeats_its_settings_and_seed(generate, sample):
    flags = ("--sampler", "choose", "--order", "front", "--top_p", 0.8, "--seed", 7, "--labels", 3, "--num_images", 2)
    first = generate(*flags, "--lengths", "1,8")
    samples = sample("--num_images", 10, *flags[:-4], "--png")
    same = ("--labels", 3, "--num_images", 2)
    for number, file in enumerate((first / "tokens.npz", first / "grid.png", first / "lengths.png",
                                   samples / "samples.npz", samples / "samples.json")):  # fmt: skip
        again = generate("--like", file, *same, output=f"again_{number}")
        assert np.array_equal(read_tokens(again / "tokens.npz").tokens, read_tokens(first / "tokens.npz").tokens)
    about = read_tokens(first / "tokens.npz").about
    assert (about["passes"], about["sampler"]["order"], about["seed"]) == (3, "front", 7)
    other = generate("--like", first / "grid.png", "--seed", 8, *same, output="other")
    about = read_tokens(other / "tokens.npz").about
    assert (about["sampler"]["order"], about["seed"]) == ("front", 8)
    with pytest.raises(UserError, match="does not say how it was sampled"):
        generate("--like", first / "3_dress_000.png", *same)
    (first / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="does not say how it was sampled"):
        generate("--like", first / "list.json", *same)
    for nothing, reason in ((first / "nothing.json", "No such file or directory"), (first, "Is a directory")):
        with pytest.raises(UserError, match=rf"cannot be read \({reason}\): name a file that a sampling command wrote"):
            generate("--like", nothing, *same)


def test_a_draft_is_made_of_its_tokens_alone(generate):
    draft = ("--num_tokens", 3, "--num_sample_steps", 8, "--labels", 3, "--num_images", 2)
    found = read_tokens(generate(*draft, "--lengths", "1,3") / "tokens.npz")
    assert found.tokens.shape == (2, 3)
    assert (found.about["passes"], found.about["sampler"]["num_sample_steps"]) == (3, 8)
    with pytest.raises(UserError, match="--lengths must be in 1..3, got 8"):
        generate("--num_tokens", 3, "--labels", 3, "--lengths", "1,8")


def test_sampler_flags_change_the_configs_settings(world, monkeypatch, tmp_path):
    seen = {}

    def generate(self, condition, seeds, **settings):
        seen.update(settings)
        return torch.zeros(len(condition), NUM_TOKENS, dtype=torch.long)

    monkeypatch.setattr(ImageBert, "generate", generate)
    place = ("--checkpoint", world / "generator", "--device", "cpu", "--output_dir", tmp_path, "--labels", 0)
    call(monkeypatch, scripts.inference_generator.main, *place, "--guidance_scale", 0, "--num_sample_steps", 5)
    assert seen["guidance_scale"] == 0 and seen["num_sample_steps"] == 5
    assert seen["guidance_decay"] == "linear" and seen["randomize_temperature"] == 30
    annealing = "--softmax_temperature_annealing"
    call(monkeypatch, scripts.inference_generator.main, *place, "--guidance_decay", "constant", annealing)
    assert seen["guidance_decay"] == "constant" and seen["softmax_temperature_annealing"] is True
    call(monkeypatch, scripts.inference_generator.main, *place, annealing, "false")
    assert seen["softmax_temperature_annealing"] is False


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--labels", "Hat"), r"a number in 0\.\.9 or one of T-shirt/top, .*, got 'Hat'"),
        (("--labels", "10"), r"a number in 0\.\.9"),
        (("--lengths", "9"), r"--lengths must be in 1\.\.8"),
        (("--lengths", "two"), "--lengths takes whole numbers"),
        (("--num_images", "0"), "--num_images must be 1 or more"),
        (("--num_sample_steps", "0"), "num_sample_steps must be an integer of 1 or more"),
    ],
)
def test_mistakes_are_one_sentence(generate, arguments, message):
    with pytest.raises(UserError, match=message):
        generate(*arguments)


def test_a_generator_says_which_tokenizer_it_needs(world, tmp_path, monkeypatch):
    config = small_config(world, f"experiment.tokenizer_checkpoint={tmp_path}/gone")
    model = ImageBert(config)
    located = Located(tmp_path / "model.safetensors", None, "mine")
    with pytest.raises(WeightsError, match=f"generator was trained with .{tmp_path}/gone. could not"):
        generators.load_its_tokenizer(model, located)
    tokenizer, _ = generators.load_its_tokenizer(model, located, world / "tokenizer")
    assert tokenizer.num_latent_tokens == NUM_TOKENS
    asked = []
    monkeypatch.setattr(
        generators, "load_tokenizer", lambda checkpoint, device: asked.append(checkpoint) or (tokenizer, None)
    )
    with pytest.raises(WeightsError, match="the tokenizer one-d-piece_fashion is not the one"):
        generators.load_its_tokenizer(model, locate("maskgit_fashion"))  # its own, whatever the model was made with
    assert asked == ["one-d-piece_fashion"]
    with pytest.raises(UserError, match="is a tokenizer; give a generator"):
        generators.load_generator(checkpoint=world / "tokenizer")


@pytest.mark.parametrize("name", sorted(name for name in BUNDLED if name.startswith("maskgit")))
def test_a_bundled_generator_has_its_tokenizer_bundled(name):
    model, located = generators.load_generator(checkpoint=name)
    tokenizer, its = generators.load_its_tokenizer(model, located)
    own = located.config["experiment"]
    known = own.get("tokenizer_identity") == identity(tokenizer)
    assert its.name in BUNDLED and (known or has_mean_code(tokenizer, own["tokenizer_mean_code"]))
    assert len(generators.class_names(located.config)) == model.num_classes
    images = to_pil(tokenizer.decode_tokens(model.generate(torch.tensor([0, model.num_classes - 1])))[0])
    assert images.size == (32, 32)


def test_a_published_config_means_the_published_generator(monkeypatch, tmp_path):
    asked = []

    def locate(source, **arguments):
        asked.append(source)
        raise WeightsError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("modeling.checkpoints.locate.locate", locate)
    for name in ("one-d-piece_s256", "titok_l32"):
        with pytest.raises(WeightsError, match="no network"):
            generators.load_generator(ROOT / f"configs/training/generator/maskgit_{name}.yaml")
    assert asked == ["turing-motors/MaskGIT_One-D-Piece-S-256", "generator_titok_l32.bin"]


def test_samples_are_one_array_in_turns_of_the_classes(sample, generate):
    folder = sample("--num_images", 23, "--png")
    with np.load(folder / "samples.npz", allow_pickle=False) as saved:
        images, labels = saved["arr_0"], saved["arr_1"]
    assert images.shape == (23, 8, 8, 3) and images.dtype == np.uint8
    assert labels.tolist() == [index % 10 for index in range(23)]
    assert len(np.unique(images.reshape(23, -1), axis=0)) == 23
    assert len(list((folder / "png").iterdir())) == 23
    assert np.array_equal(pixels(folder / "png/000013_003.png"), images[13])
    same = generate("--labels", 3, "--num_images", 2, "--batch_size", 1)
    assert np.abs(pixels(same / "3_dress_001.png").astype(int) - images[13]).max() <= 1
    assert not (folder / "parts").exists()
    with zipfile.ZipFile(folder / "samples.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_sampling_goes_on_after_a_kill(sample, monkeypatch, capsys):
    whole = (sample("--num_images", 20, output="whole") / "samples.npz").read_bytes()
    original, parts = sampled_set.sample_part, []

    def sample_part(generator, tokenizer, indices, *arguments):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(indices)
        return original(generator, tokenizer, indices, *arguments)

    monkeypatch.setattr(sampled_set, "sample_part", sample_part)
    with pytest.raises(KeyboardInterrupt):
        sample("--num_images", 20)
    with pytest.raises(UserError, match="seed was 42 and is now 1"):
        sample("--num_images", 20, "--seed", 1)
    parts.clear()
    folder = sample("--num_images_per_class", 2)
    assert parts == [range(16, 20)] and (folder / "samples.npz").read_bytes() == whole
    sample("--num_images", 20)
    assert "are in" in capsys.readouterr().out and len(parts) == 1
    record = json.loads((folder / "samples.json").read_text())
    del record["plan"]["sampler"]["sampler"]  # as it was written before there were several
    (folder / "samples.json").write_text(json.dumps(record))
    sample("--num_images", 20)
    assert "are in" in capsys.readouterr().out
    with pytest.raises(UserError, match="sampler was .* and is now"):
        sample("--num_images", 20, "--guidance_scale", 9)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": []}', '{"plan": {"seed": 1, "sampler": {"mine": 1}}}'])
def test_another_program_s_samples_json_is_explained_in_one_sentence(sample, tmp_path, text):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/samples.json").write_text(text)
    with pytest.raises(UserError, match="holds samples.json, and no command of ours has left that there: name another"):
        sample("--num_images", 8)


@pytest.mark.parametrize("name", ["samples.npz", "png/000003_003.png"])
def test_samples_that_are_gone_are_not_there_already(sample, name):
    folder = sample("--num_images", 4, "--png")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"samples.json says that .*{name} is there, and it is not: delete that folder"):
        sample("--num_images", 4, "--png")


def test_samples_are_of_one_precision(sample):
    folder = sample("--num_images", 8)
    plan = json.loads((folder / "samples.json").read_text())["plan"]
    assert (plan["precision"], plan["compiled"]) == ("tf32", False)
    with pytest.raises(UserError, match='precision was "tf32" and is now "bf16"'):
        sample("--num_images", 8, "--precision", "bf16")
    with pytest.raises(UserError, match="compiled was false and is now true"):
        sample("--num_images", 8, "--compile")
    half = sample("--num_images", 8, "--precision", "bf16", "--batch_size", "auto", output="half")
    assert np.load(half / "samples.npz")["arr_0"].shape == (8, 8, 8, 3)


def test_two_processes_sample_what_one_samples(world, tmp_path, monkeypatch):
    arguments = ("--checkpoint", world / "generator", "--num_images", 300, "--num_sample_steps", 2, "--device", "cpu")
    call(monkeypatch, scripts.sample_imagenet.main, *arguments, "--output_dir", tmp_path / "one")
    on_two_processes("scripts/sample_imagenet.py", *arguments, "--output_dir", tmp_path / "two")
    assert (tmp_path / "one/samples.npz").read_bytes() == (tmp_path / "two/samples.npz").read_bytes()
