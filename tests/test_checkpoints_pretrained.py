"""Models are saved and come back the same; a checkpoint says which model it is."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file
from torch import Tensor, nn

from modeling.checkpoints import WeightsError
from modeling.checkpoints.locate import locate
from modeling.checkpoints.pretrained import _model_card, load_weights
from modeling.checkpoints.published import BUNDLED
from modeling.checkpoints.registry import MODELS, model_class
from modeling.checkpoints.state import read_state_dict
from modeling.maskgit import ImageBert
from modeling.one_d_piece import OneDPiece
from modeling.pixel_vqgan import PixelVQGAN
from modeling.titok import TiTok
from tests.checkpoint_data import Toy, same, teacher, tokenizer_config, toy
from utils.config import load_config
from utils.errors import UserError
from utils.paths import ROOT


def test_a_saved_model_comes_back_with_identical_outputs(tmp_path):
    model = OneDPiece(tokenizer_config()).eval()
    model.save_pretrained(tmp_path / "deep/model")
    again = OneDPiece.from_pretrained(tmp_path / "deep/model")
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(pixels)[0], again(pixels)[0])
    assert not again.training
    assert sorted(path.name for path in (tmp_path / "deep/model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_loading_draws_no_random_numbers(tmp_path):
    OneDPiece(tokenizer_config()).save_pretrained(tmp_path / "m")
    before = torch.get_rng_state()
    OneDPiece.from_pretrained(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_model_trains_what_a_new_one_trains(tmp_path):
    model = OneDPiece(tokenizer_config())
    model.save_pretrained(tmp_path / "m")
    trained = {
        name: value.requires_grad for name, value in OneDPiece.from_pretrained(tmp_path / "m").named_parameters()
    }
    assert trained == {name: value.requires_grad for name, value in model.named_parameters()}
    assert set(trained.values()) == {True, False}


def test_loaded_tensors_are_the_model_s_own_and_contiguous(tmp_path):
    shared = torch.rand(3, 2)
    torch.save({"inner.weight": shared.T, "inner.bias": shared[0]}, tmp_path / "w.bin")
    model = Toy.from_pretrained(tmp_path / "w.bin", config={"model": {"width": 3}})
    assert torch.equal(model.inner.weight, shared.T) and model.inner.weight.is_contiguous()
    model.inner.weight.data.zero_()
    assert torch.equal(model.inner.bias, shared[0])


@pytest.mark.parametrize("kind", MODELS.values(), ids=lambda kind: kind.__name__)
def test_a_model_has_no_tensors_but_those_that_a_checkpoint_holds(kind):
    """Loading builds it without values, so that nobody would compute the others."""
    config = tokenizer_config()
    config["model"]["generator"] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = kind(config)
    assert {name for name, _ in model.named_buffers()} <= model.state_dict().keys()
    for module in model.modules():
        assert not any(isinstance(value, Tensor) for value in vars(module).values())


def test_a_constant_that_no_checkpoint_holds_is_an_error(tmp_path):
    class WithConstant(Toy):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("mean", torch.zeros(3), persistent=False)

    toy().save_pretrained(tmp_path / "m")
    with pytest.raises(AssertionError, match="no checkpoint holds mean"):
        WithConstant.from_pretrained(tmp_path / "m")


def test_the_saved_config_is_resolved(tmp_path):
    Toy({"size": 5, "model": {"width": "${size}"}}).save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text()) == {"size": 5, "model": {"width": 5}}


def test_a_card_has_the_licence_that_it_is_given_and_each_part_once(tmp_path):
    body = "# other\n\n# other\n\nText.\n\n```bash\n# run\n```\n\n## Use\n\nOld.\n"
    whole = f"---\nlicense: mit\nlibrary_name: x\n---\n\n{body}"
    for _ in range(2):
        toy().save_pretrained(tmp_path / "m", card=whole)
        whole = (tmp_path / "m/README.md").read_text()
        assert whole.startswith("---\nlicense: mit\nlibrary_name: one-d-piece\n")
        assert [line for line in whole.splitlines() if line.startswith("#")] == ["# m", "# run", "## Use"]
        assert "\n\nText.\n" in whole and "Old." not in whole
    toy().save_pretrained(tmp_path / "text", card="Text.\n\n```bash\n# run\n```")
    assert "# run\n" in (tmp_path / "text/README.md").read_text()


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_card_is_what_is_written_again_of_it(name):
    card = (BUNDLED[name] / "README.md").read_text()
    kind = model_class(locate(name).config)
    figures = ModelCard(card).data.eval_results
    assert _model_card(kind.from_pretrained(name), name, card, figures) == card and "license: apache-2.0" in card


def test_the_card_names_the_class_and_no_licence_of_its_own(tmp_path):
    toy().save_pretrained(tmp_path / "m", card="Trained on *toys*.")
    card = (tmp_path / "m/README.md").read_text()
    assert card.startswith("---\nlibrary_name: one-d-piece\n") and "license" not in card
    assert "pipeline_tag: image-to-image" in card
    assert "- image-tokenization" in card
    assert "Trained on *toys*." in card
    assert 'Toy.from_pretrained("m")' in card


def test_saving_into_a_training_output_keeps_its_other_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    toy(seed=1).save_pretrained(tmp_path)
    toy(seed=2).save_pretrained(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"
    assert same(Toy.from_pretrained(tmp_path), toy(seed=2))


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        toy().save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_weights_stored_in_half_precision_load_into_float32(tmp_path):
    model = toy()
    model.save_pretrained(tmp_path / "m", dtype=torch.float16)
    assert safetensors.torch.load_file(tmp_path / "m/model.safetensors")["inner.weight"].dtype == torch.float16
    again = Toy.from_pretrained(tmp_path / "m")
    assert again.inner.weight.dtype == torch.float32
    assert torch.equal(again.inner.weight, model.inner.weight.half().float())


def test_views_and_tied_weights_are_saved(tmp_path):
    model = toy(width=2)
    model.inner.weight.data = model.inner.weight.data.T
    model.tied = nn.Linear(2, 2)
    model.tied.weight = model.inner.weight
    model.save_pretrained(tmp_path / "m")
    stored = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    assert torch.equal(stored["tied.weight"], model.inner.weight)


def test_a_compiled_part_is_saved_under_its_own_name(tmp_path):
    model = toy()
    model.inner = torch.compile(model.inner)
    model.save_pretrained(tmp_path / "m")
    assert same(Toy.from_pretrained(tmp_path / "m"), toy())


def test_saved_weights_are_as_readable_as_the_configuration(tmp_path):
    model = PixelVQGAN({"model": {"pixel_vqgan": {"channels": 32, "channel_multipliers": [1], "codebook_size": 4}}})
    model.save_pretrained(tmp_path / "model")
    modes = {(tmp_path / "model" / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_a_loose_file_without_config_hears_which_config_fits(tmp_path):
    config = load_config(ROOT / "configs/fashion/eval.yaml")
    torch.save(OneDPiece(config).state_dict(), tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match="it fits configs/fashion/eval.yaml"):
        OneDPiece.from_pretrained(tmp_path / "weights.bin")


def test_a_checkpoint_of_another_class_names_its_own(tmp_path):
    OneDPiece(tokenizer_config()).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(WeightsError, match=r"holds a OneDPiece, not a PixelVQGAN: load it with modeling.one_d_piece"):
        PixelVQGAN.from_pretrained(tmp_path / "tokenizer")
    assert type(TiTok.from_pretrained(tmp_path / "tokenizer")) is TiTok


def test_weights_of_another_role_say_so_whatever_the_configuration():
    config = tokenizer_config()
    with pytest.raises(WeightsError, match="maskgit_fashion is a generator; give a tokenizer"):
        OneDPiece.from_pretrained("maskgit_fashion", config=config)
    with pytest.raises(WeightsError, match="maskgit_fashion is a generator; give a tokenizer"):
        load_weights(OneDPiece(config), "maskgit_fashion")
    with pytest.raises(WeightsError, match="a checkpoint is named by a string or a path, got 3 "):
        OneDPiece.from_pretrained(3)


def test_titok_weights_become_a_one_d_piece_only_by_a_config(tmp_path):
    config = tokenizer_config()
    config["model"]["type"] = "titok"
    TiTok(config).save_pretrained(tmp_path / "m")
    with pytest.raises(WeightsError, match="holds a TiTok, not a OneDPiece"):
        OneDPiece.from_pretrained(tmp_path / "m")
    OneDPiece.from_pretrained(tmp_path / "m", config=tokenizer_config())


def test_importing_any_part_of_modeling_registers_every_model():
    code = "from modeling.checkpoints.registry import MODELS; print(sorted(kind.__name__ for kind in MODELS.values()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['ImageBert', 'OneDPiece', 'PixelVQGAN', 'TiTok', 'UViTBert']"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, name):
    model = teacher()
    model.save_pretrained(tmp_path / "model")
    state = model.state_dict()
    state["quantize.embedding.weight"][0, 0] = value
    (tmp_path / "model/model.safetensors").unlink()
    save = save_file if name.endswith("safetensors") else torch.save
    save(state, tmp_path / "model" / name)
    with pytest.raises(WeightsError, match=r"quantize.embedding.weight of .* holds 1 values of .* no numbers"):
        PixelVQGAN.from_pretrained(tmp_path / "model")
    with pytest.raises(WeightsError, match="quantize.embedding.weight of the model holds 1 values"):
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_weights_beyond_half_precision_are_not_stored_in_it(tmp_path):
    model = teacher()
    with torch.no_grad():
        model.quantize.embedding.weight[0, 0] = 1e5
    with pytest.raises(WeightsError, match="values up to 1e.05, and torch.float16 holds 6.55e.04 at most"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    model.save_pretrained(tmp_path / "bfloat", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module.module.", "module._orig_mod."]
)
def test_what_wrappers_put_into_names_is_removed(tmp_path, prefix):
    model = teacher()
    state = {
        f"{prefix}{name}".replace("encoder.", "encoder._orig_mod."): value for name, value in model.state_dict().items()
    }
    torch.save(state, tmp_path / "wrapped.bin")
    assert read_state_dict(tmp_path / "wrapped.bin").keys() == model.state_dict().keys()


@pytest.mark.parametrize("value", [-1, 0, "wide", None])
def test_a_given_configuration_that_makes_no_model_is_one_sentence(tmp_path, value):
    torch.save(TiTok(tokenizer_config()).state_dict(), tmp_path / "weights.bin")
    with pytest.raises(UserError) as error:
        TiTok.from_pretrained(tmp_path / "weights.bin", config=tokenizer_config(token_size=value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [TiTok, ImageBert])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_titoks_own_repositories_load_by_their_weights(tmp_path, kind, name):
    """Their config.json has `model.vq_model` and `model.generator`, no `model.type`, beside the weights of either."""
    config = tokenizer_config()
    del config["model"]["type"]
    config["model"]["generator"] = {
        "model_type": "ViT",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "condition_num_classes": 10,
    }
    torch.manual_seed(0)
    model = kind(config)
    model.save_pretrained(tmp_path / "repository")
    if name.endswith("bin"):
        torch.save(model.state_dict(), tmp_path / "repository" / name)
        (tmp_path / "repository/model.safetensors").unlink()
    assert same(kind.from_pretrained(tmp_path / "repository"), model)
    other = ImageBert if kind is TiTok else TiTok
    with pytest.raises(WeightsError, match="do not fit|holds a"):
        other.from_pretrained(tmp_path / "repository")
