"""scripts/export_model.py: a folder that is the same model elsewhere, and names nothing that is only here."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import OmegaConf

import scripts.export_model
from modeling.generators import load_generator, load_its_tokenizer
from modeling.identity import identity
from modeling.maskgit import ImageBert
from modeling.one_d_piece import OneDPiece
from tests.fill import fill
from tests.generator_data import call, small_config
from utils.config import to_plain
from utils.errors import UserError
from utils.files import sha256_of, write_json
from utils.paths import ROOT

START = "experiment.init_weight"
TEACHER = "model.vq_model.pretrained_tokenizer_weight"


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Save a model, export it by the command, and return the folder."""
    monkeypatch.chdir(tmp_path)

    def export(kind, *arguments, **values):
        config = OmegaConf.create(to_plain(small_config(tmp_path)))
        if kind is OneDPiece:
            del config.model.generator
        for key, value in values.items():
            OmegaConf.update(config, key.replace("__", "."), value)
        fill(kind(config), 0).save_pretrained("trained_here")
        places = "--checkpoint", "trained_here", "--output_dir", "shared"
        call(monkeypatch, scripts.export_model.main, *places, *arguments)
        return tmp_path / "shared"

    return export


def test_files_of_others_stay(export, tmp_path, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "README.md").write_text("# My repository\n")
    export(OneDPiece)
    assert (shared / "README.md").read_text() == "# My repository\n" and "stays as it is" in caplog.text
    assert OneDPiece.from_pretrained(shared).eval()
    (shared / "README.md").unlink()
    export(OneDPiece, "--dtype", "float32")
    assert "library_name: one-d-piece" in (shared / "README.md").read_text()
    export(OneDPiece)  # ours is replaced


def test_weights_are_not_rounded_in_their_own_place(export, tmp_path):
    with pytest.raises(UserError, match="would be rounded to float16: name another folder"):
        export(OneDPiece, "--output_dir", "trained_here")
    export(OneDPiece, "--output_dir", "trained_here", "--dtype", "float32")
    half = export(OneDPiece)
    call_again = ("--checkpoint", half, "--output_dir", half)  # as for another card
    export(OneDPiece, *call_again)


def metrics(weights):
    row = {"name": "4 tokens", "system": "mine", "tokens": 4, "bytes_per_image": 5, "psnr": 20.5, "fd_dinov2": 9.25}
    record = {"checkpoint": "mine", "checkpoint_sha256": sha256_of(weights), "config": "configs/own/eval.yaml"}
    record["originals"] = {"seen": 12, "sha256": "ab"}
    rows = [row, {"name": "JPEG", "system": "JPEG", "psnr": 1.0}]
    return {"rows": rows, "codebook": {"usage": 0.5}, "protocol": record}


def test_the_card_has_the_figures_of_an_evaluation_of_these_weights(export, tmp_path):
    export(OneDPiece)
    weights = tmp_path / "trained_here/model.safetensors"
    write_json(tmp_path / "metrics.json", metrics(weights))
    found = ModelCard.load(export(OneDPiece, "--metrics", "metrics.json") / "README.md").data
    assert found.model_name == "shared" and "license" not in found.to_dict()
    figures = {result.metric_name: (result.metric_value, result.metric_args) for result in found.eval_results}
    at = {"tokens": 4, "bytes_per_image": 5}
    assert figures["PSNR, dB, 4 tokens"] == (20.5, at) and figures["FD-DINOv2, 4 tokens"] == (9.25, at)
    assert figures["Codebook usage"] == (0.5, None) and len(figures) == 3
    assert found.eval_results[0].dataset_name == "own/eval.yaml"
    assert found.eval_results[0].dataset_args == {"num_images": 12, "sha256": "ab"}
    write_json(tmp_path / "metrics.json", metrics(tmp_path / "metrics.json"))
    with pytest.raises(UserError, match="was measured with other weights than "):
        export(OneDPiece, "--metrics", "metrics.json")
    with pytest.raises(UserError, match="must be a metrics.json that evaluate_reconstruction.py"):
        export(OneDPiece, "--metrics", "nowhere.json")


def test_the_card_has_figures_against_statistics_that_say_no_number_of_images(export, tmp_path):
    export(OneDPiece)
    measured = metrics(tmp_path / "trained_here/model.safetensors")
    del measured["protocol"]["originals"]
    measured["protocol"]["reference"] = {"source": "stats/VIRTUAL.npz", "statistics_sha256": "cd"}
    write_json(tmp_path / "metrics.json", measured)
    found = ModelCard.load(export(OneDPiece, "--metrics", "metrics.json") / "README.md").data.eval_results[0]
    assert (found.dataset_name, found.dataset_args) == ("stats/VIRTUAL.npz", {"sha256": "cd"})


def test_the_card_leaves_out_a_frechet_distance_of_too_few_images(export, tmp_path):
    export(OneDPiece)
    measured = metrics(tmp_path / "trained_here/model.safetensors")
    for dimension, expected in ((12, {"psnr", "fd_dinov2", "codebook_usage"}), (13, {"psnr", "codebook_usage"})):
        measured["protocol"]["feature_network"] = {"dimension": dimension}
        write_json(tmp_path / "metrics.json", measured)
        found = ModelCard.load(export(OneDPiece, "--metrics", "metrics.json") / "README.md").data
        assert {result.metric_type for result in found.eval_results} == expected


CARDS = sorted((ROOT / "assets/models").glob("*/README.md"))
COLUMNS = {
    "PSNR, dB": "psnr",
    "SSIM": "ssim",
    "EfficientNet-Lite0 distance": "perceptual_efficientnet_lite0",
    "FD-EfficientNet-Lite0": "fd_efficientnet_lite0",
    "precision": "precision",
    "recall": "recall",
}


def figures_in_words(card):
    """(tokens, measure): the number as the first table of a card has it, written out."""
    rows = re.findall(r"^\|(.*)\|$", card.text.partition("## Figures")[2].partition("\n##")[0], re.MULTILINE)
    titles, _, *rows = ([cell.strip() for cell in row.split("|")] for row in rows)
    for first, *cells in rows:
        if tokens := re.fullmatch(r"(\d+)( tokens?)?", first):
            for title, cell in zip(titles[1:], cells, strict=True):
                if title in COLUMNS:
                    yield (int(tokens[1]), COLUMNS[title]), cell.replace(",", "")


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.parent.name)
def test_the_cards_of_bundled_models_say_twice_the_same(path):
    """In words, and as the hub's model-index, which export_model --metrics has written: the same measurement."""
    card = ModelCard.load(path)
    assert card.data.model_name == path.parent.name and card.text.count(f"# {path.parent.name}\n") == 1
    measured = {
        (result.metric_args and result.metric_args["tokens"], result.metric_type): result.metric_value
        for result in card.data.eval_results
    }
    words = dict(figures_in_words(card))
    assert words
    for which, text in words.items():
        decimals = len(text.partition(".")[2])
        assert measured[which] == pytest.approx(float(text), abs=0.51 * 10**-decimals), which
    for result in card.data.eval_results:
        assert ("EfficientNet-Lite0" in result.metric_name) == ("efficientnet_lite0" in result.metric_type)


@pytest.mark.parametrize("files", [{"config.json": "{}"}, {"config.json": "["}, {"model.safetensors": "weights"}])
def test_a_model_of_another_program_stays(export, tmp_path, files):
    (tmp_path / "shared").mkdir()
    for name, text in files.items():
        (tmp_path / "shared" / name).write_text(text)
    with pytest.raises(UserError, match="is there and not of ours: move it away, or name another folder"):
        export(OneDPiece)
    assert {path.name: path.read_text() for path in (tmp_path / "shared").iterdir()} == files


def test_a_home_folder_is_expanded_in_python_too(export, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    export(OneDPiece)
    model = OneDPiece.from_pretrained("shared")
    model.save_pretrained("~/model")
    write_json("~/notes/x.json", {})
    assert (tmp_path / "home/model/model.safetensors").is_file() and (tmp_path / "home/notes/x.json").is_file()
    assert OneDPiece.from_pretrained("~/model").eval() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("teacher", "kept"),
    [
        ("checkpoints/fashion_teacher", False),
        ("trained_here", False),  # a folder that is here
        ("/data/teacher.safetensors", False),
        ("maskgit-vqgan-imagenet-f16-256.bin", True),
        ("owner/teacher", True),
    ],
)
def test_a_shared_tokenizer_names_only_a_teacher_that_others_can_have(export, teacher, kept):
    folder = export(OneDPiece, model__vq_model__pretrained_tokenizer_weight=teacher, experiment__init_weight=teacher)
    model, trained = OneDPiece.from_pretrained(folder), OneDPiece.from_pretrained("trained_here")
    for key in (START, TEACHER):
        assert OmegaConf.select(model.config, key) == (teacher if kept else "")
        OmegaConf.update(trained.config, key, OmegaConf.select(model.config, key))
    assert model.config == trained.config
    assert (teacher in (folder / "README.md").read_text()) == kept
    state = trained.state_dict()
    assert all(torch.equal(value, state[name].half().float()) for name, value in model.state_dict().items())
    assert identity(model) == identity(trained)


def test_a_shared_generator_says_where_its_tokenizer_is(export):
    folder = export(ImageBert, "--tokenizer", "one-d-piece_fashion", model__vq_model__num_latent_tokens=32)
    generator, located = load_generator(checkpoint=folder)
    with pytest.raises(UserError, match="tokens of 64 codes, and the tokenizer one-d-piece_fashion has 32"):
        load_its_tokenizer(generator, located)


def test_a_generator_is_not_shared_without_its_tokenizer(export, tmp_path):
    with pytest.raises(UserError, match=f"tokenizer, {tmp_path}/tokenizer, cannot be loaded elsewhere: give it"):
        export(ImageBert)
    with pytest.raises(UserError, match="tokenizer, checkpoints/mine, cannot be loaded elsewhere"):
        export(ImageBert, "--tokenizer", "checkpoints/mine")
    with pytest.raises(UserError, match="--tokenizer is for a generator, and this is a tokenizer or a teacher"):
        export(OneDPiece, "--tokenizer", "one-d-piece_fashion")
    assert not (tmp_path / "shared").exists()
