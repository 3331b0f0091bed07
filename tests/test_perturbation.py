"""Tokens replaced in training: which, by what, and that nothing happens where it is off."""

import pytest
import torch

from modeling.checkpoints.state import fingerprint
from modeling.maskgit import ImageBert
from modeling.modules.perturbation import Perturbation
from modeling.modules.quantizer import VectorQuantizer
from modeling.one_d_piece import OneDPiece
from modeling.tasks.tokenizer import perturbation, tokenizer_task
from modeling.titok import TiTok
from tests.test_tokenizer import tiny_config
from tests.training_runs import job_config
from utils.config import load_config
from utils.errors import UserError
from utils.paths import ROOT


@pytest.fixture
def quantizer():
    quantizer = VectorQuantizer(codebook_size=64, token_size=2, use_l2_norm=False)
    quantizer.embedding.weight.data = torch.stack([torch.arange(64.0), torch.zeros(64)], dim=1)  # on a line
    return quantizer


def test_a_token_becomes_one_of_its_nearest_codes_and_never_itself(quantizer):
    tokens = torch.full((200, 8), 30)
    changed = Perturbation(quantizer, images=1.0, tokens=1.0, neighbours=4)(tokens, None)
    assert changed.unique().tolist() == [28, 29, 31, 32]


def test_the_shares_of_images_and_tokens_are_those_asked_for(quantizer):
    torch.manual_seed(0)
    tokens = torch.randint(64, (4000, 8))
    replaced = Perturbation(quantizer, images=0.1, tokens=0.5, neighbours=4)(tokens, None) != tokens
    touched = replaced.any(dim=1)
    assert abs(touched.float().mean() - 0.1) < 0.02
    assert abs(replaced[touched].float().mean() - 0.5) < 0.03


def test_replacements_can_be_drawn_from_what_fills_in(quantizer):
    seen = []

    def fill(tokens, hidden, classes):
        seen.append((hidden, classes))
        return torch.nn.functional.one_hot(classes[:, None].expand(tokens.shape), 64) * 1e4

    tokens, classes = torch.zeros(50, 8, dtype=torch.long), torch.arange(50) + 1
    changed = Perturbation(quantizer, images=1.0, tokens=0.5, neighbours=4, fill=fill)(tokens, classes)
    hidden = seen[0][0]
    assert torch.equal(changed, torch.where(hidden, classes[:, None], tokens)) and 0 < hidden.sum() < hidden.numel()


@pytest.mark.parametrize("kind", [OneDPiece, TiTok])
def test_other_tokens_are_decoded_and_the_encoder_hears_of_it(kind):
    torch.manual_seed(0)
    model = kind(tiny_config(freeze_tokens=False, tail_drop="none")).train()
    pixels = torch.rand(2, 3, 16, 16)
    plain, result = model(pixels)
    others = (result["min_encoding_indices"].flatten(1) + 1) % 64
    changed, _ = model(pixels, change=lambda tokens: others)
    torch.testing.assert_close(changed, model.decode_tokens(others), rtol=1e-3, atol=2e-4)
    assert not torch.allclose(changed, plain)
    changed.sum().backward()
    assert model.encoder.conv_out.weight.grad.abs().sum() > 0


def test_off_is_off_by_default_and_while_nothing_is_quantised(quantizer, tmp_path):
    config = job_config("stage1", tmp_path, tmp_path)
    assert not perturbation(OneDPiece(config), config)
    del config.training.perturb  # a configuration of before
    assert not perturbation(OneDPiece(config), config)
    on = Perturbation(quantizer, images=0.1, tokens=0.5, neighbours=4)
    assert on
    quantizer.bypass = True
    assert not on


def test_a_decoder_is_tuned_on_what_its_generator_draws():
    task = tuning_of("one-d-piece_fashion")
    task.start()
    batch = {"image": torch.rand(4, 3, 32, 32), "class_id": torch.arange(4)}
    asked, fill = [], task.perturbation.fill
    task.perturbation.fill = lambda *inputs: asked.append(inputs) or fill(*inputs)
    _, loss, _ = next(task.losses(batch, 0))
    loss.backward()
    assert len(asked) == 1 and asked[0][1].any(dim=1).all()
    trained = {name.split(".")[0] for name, value in task.model.named_parameters() if value.grad is not None}
    assert trained == {"decoder", "pixel_quantize", "pixel_decoder"}
    weights = ImageBert.from_pretrained("maskgit_fashion").state_dict()
    assert task.sources["training.perturb.generator"] == fingerprint(weights)  # another one would be refused on resume


def test_a_decoder_is_tuned_on_images_without_classes_too():
    task = tuning_of("one-d-piece_fashion")
    task.start()
    tokens, hidden = torch.randint(32, (2, 32)), torch.ones(2, 32, dtype=torch.bool)
    known, unknown = (task.perturbation.fill(tokens, hidden, torch.full((2,), label)) for label in (0, -1))
    assert known.shape == unknown.shape and not torch.allclose(known, unknown)


def test_a_class_that_the_generator_does_not_know_is_told_in_a_sentence():
    task = tuning_of("one-d-piece_fashion")
    task.start()
    tokens, hidden = torch.randint(32, (2, 32)), torch.ones(2, 32, dtype=torch.bool)
    with pytest.raises(UserError, match="knows classes 0 to 9, got an image of class 10"):
        task.perturbation.fill(tokens, hidden, torch.tensor([-1, 10]))


def test_a_generator_of_other_tokens_does_not_tune_a_decoder():
    with pytest.raises(UserError, match="is not the one that the generator was trained with"):
        tuning_of("one-d-piece_emoji").start()


def tuning_of(tokenizer):
    """Stage 2 of a bundled tokenizer, its tokens frozen and half of them drawn by the generator of garments."""
    changes = ["model.vq_model.freeze_tokens=True", "losses.perceptual_weight=0.0", "training.perturb.images=1.0"]
    changes += [f"experiment.init_weight={tokenizer}", "training.perturb.generator=maskgit_fashion"]
    return tokenizer_task(load_config(ROOT / "configs/fashion/stage2.yaml", changes))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"images": 1.5}, "training.perturb.images is a share, 0 to 1, got 1.5"),
        ({"images": 0.1, "tokens": -1}, "training.perturb.tokens is a share, 0 to 1, got -1"),
        ({"images": 0.1, "neighbours": 32}, r"neighbours must be in 1..31, the other codes, got 32"),
        ({"images": 0.1, "first_codes": 2}, "with model.vq_model.first_codes the first places have only some"),
        ({"images": 0.1, "generator": "maskgit_fashion"}, "draws tokens of a finished tokenizer: train its decoder"),
    ],
)
def test_a_wrong_setting_is_told_in_a_sentence(tmp_path, change, complaint):
    config = job_config("stage1", tmp_path, tmp_path)
    config.model.vq_model.first_codes = change.pop("first_codes", None)
    config.training.perturb.update(change)
    with pytest.raises(UserError, match=complaint):
        perturbation(OneDPiece(config), config)
