"""The tokenizers and the pixel VQGAN: names, published numbers, lengths, tail token drop."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from modeling.identity import identity
from modeling.losses import code_prediction_loss
from modeling.modules.lengths import LengthGains
from modeling.modules.quantizer import VectorQuantizer, growing_choices
from modeling.one_d_piece import OneDPiece, alignment_loss, draw_lengths, powers_of_two
from modeling.pixel_vqgan import PixelVQGAN
from modeling.tasks.tokenizer import gains_of
from modeling.titok import TiTok
from modeling.tokenizers import build_tokenizer
from tests.fill import assert_close, fill, image, integers, tensor
from utils.errors import UserError

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "facts" / "state_dicts.json").read_text())


def published_config(size="small", num_latent_tokens=256, finetune_decoder=True, **vq_model):
    return OmegaConf.create(
        {
            "model": {
                "vq_model": {
                    "codebook_size": 4096,
                    "token_size": 12,
                    "use_l2_norm": True,
                    "commitment_cost": 0.25,
                    "vit_enc_model_size": size,
                    "vit_dec_model_size": size,
                    "vit_enc_patch_size": 16,
                    "vit_dec_patch_size": 16,
                    "num_latent_tokens": num_latent_tokens,
                    "finetune_decoder": finetune_decoder,
                    **vq_model,
                }
            },
            "dataset": {"preprocessing": {"crop_size": 256}},
        }
    )


def tiny_config(num_latent_tokens=8, finetune_decoder=True, **vq_model):
    config = published_config("tiny", num_latent_tokens, finetune_decoder)
    config.model.vq_model.update({"codebook_size": 64, "vit_enc_patch_size": 8, "vit_dec_patch_size": 4, **vq_model})
    config.model.pixel_vqgan = {
        "channels": 32,
        "channel_multipliers": [1, 1, 2],
        "num_res_blocks": 1,
        "latent_channels": 16,
        "codebook_size": 32,
    }
    config.dataset.preprocessing.crop_size = 16
    return config


@pytest.mark.parametrize("name", [name for name in FACTS if name.startswith(("one-d-piece", "titok"))])
def test_names_and_shapes_are_the_published_ones(name):
    model_name, stage = name.split(":finetune=")
    family, tag = model_name.split("_")
    size = {"s": "small", "b": "base", "l": "large"}[tag[0]]
    with torch.device("meta"):
        config = published_config(size, int(tag[1:]), stage == "True")
        model = (OneDPiece if family == "one-d-piece" else TiTok)(config)
    got = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert sorted(got) == sorted(FACTS[name]["state"])
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == FACTS[name]["trainable"]


def test_the_teacher_has_the_published_names_and_shapes():
    with torch.device("meta"):
        model = PixelVQGAN(published_config())
    got = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert sorted(got) == sorted(FACTS["PretrainedTokenizer"]["state"])


@pytest.mark.parametrize("stage", [1, 2])
def test_one_d_piece_s256_gives_the_published_numbers(stage):
    golden = np.load(HERE / "golden" / f"tokenizer_s256_stage{stage}.npz")
    model = fill(OneDPiece(published_config(finetune_decoder=stage == 2)), 0).eval()
    pixels = image(1, 2, 256, 256)
    with torch.no_grad():
        assert_close(model.encoder(pixels, model.latent_tokens), golden, "z")
        z_quantized, result = model.encode(pixels)
        clear = torch.from_numpy(golden["indices__margin"]) >= 1e-5
        same = result["min_encoding_indices"] == torch.from_numpy(golden["indices"])
        assert same[clear].all() and result["min_encoding_indices"].shape == (2, 1, 256)
        assert_close(z_quantized, golden, "z_quantized")
        for loss in ("quantizer_loss", "commitment_loss", "codebook_loss"):
            assert_close(result[loss], golden, loss)
        tokens = integers(7, "one-d-piece_s256", (2, 256), 0, 4096)
        for length in (1, 7, 64, 256):
            assert_close(model.decode_tokens(tokens, length=length), golden, f"decode_tokens[{length}]")
        assert torch.equal(model.decode_tokens(tokens[:, None], length=7), model.decode_tokens(tokens, length=7))
        assert_close(model.decode(z_quantized), golden, "decode")
        output, result = model(pixels[:1])
        assert_close(output, golden, "forward")


def test_the_teacher_gives_the_published_numbers():
    golden = np.load(HERE / "golden" / "maskgit_vqgan.npz")
    model = fill(PixelVQGAN(published_config()), 0).eval()
    pixels = image(1, 2, 256, 256)
    clear = torch.from_numpy(golden["codes__margin"]) >= 1e-5
    with torch.no_grad():
        assert_close(model.encoder(pixels), golden, "hidden")
    codes = model.encode(pixels)
    assert codes.shape == (2, 256) and torch.equal(codes[clear], torch.from_numpy(golden["codes"])[clear])
    codes = integers(8, "vqgan", (2, 256), 0, 1024)
    assert_close(model.decode(codes), golden, "decode")
    assert_close(model.decode(codes.view(2, 16, 16)), golden, "decode_bhw")


def test_a_small_teacher_sees_colours_with_fewer_groups():
    """A group of one channel loses its mean: two plain colours then have almost the same latents."""
    torch.manual_seed(0)
    config = tiny_config()
    images = torch.tensor([0.2, 0.8]).view(2, 1, 1, 1).expand(2, 3, 96, 96)
    distances = []
    for norm_groups in (32, 8):
        config.model.pixel_vqgan["norm_groups"] = norm_groups
        model = PixelVQGAN(config).eval()
        with torch.no_grad():
            one, other = model.encoder(images)[:, :, 12, 12]  # in the middle, far from the zeros around an image
        distances.append(float((one - other).norm() / one.norm()))
    assert distances[1] > 3 * distances[0], distances


def test_the_stage_1_loss_and_its_gradients_are_the_published_ones():
    golden = np.load(HERE / "golden" / "loss_stage1.npz")
    codes = integers(11, "codes", (2, 256), 0, 1024)
    fixed = code_prediction_loss(tensor(11, "logits", (2, 1024, 16, 16), 2), codes)
    assert_close(fixed, golden, "fixed.reconstruction_loss")
    assert float(fixed + 0.25) == pytest.approx(float(golden["fixed.total_loss"]), rel=1e-5)
    model = fill(OneDPiece(published_config(finetune_decoder=False)), 0).eval()
    logits, result = model(image(1, 2, 256, 256))
    loss = code_prediction_loss(logits, codes) + result["quantizer_loss"]
    assert_close(loss, golden, "model.total_loss")
    loss.backward()
    parameters = dict(model.named_parameters())
    for key in golden.files:
        if key.startswith("grad[") and key.endswith(".norm"):
            name = key[len("grad[") : -len("].norm")]
            gradient = parameters[name].grad
            assert float(gradient.norm()) == pytest.approx(float(golden[key]), rel=1e-3)
            assert_close(gradient / gradient.abs().mean(), golden, f"grad[{name}]", tolerance=2e-3)


def test_quantizing_codes_gives_them_back():
    quantize = VectorQuantizer(codebook_size=50, token_size=6)
    codes = torch.arange(50).view(1, 1, 50)
    _, result = quantize(3 * quantize.embedding(codes).movedim(-1, 1))
    assert torch.equal(result["min_encoding_indices"], codes)


def test_the_straight_through_gradient_passes_the_quantizer():
    quantize = VectorQuantizer(codebook_size=16, token_size=4, use_l2_norm=False)
    z = torch.randn(2, 4, 1, 3, requires_grad=True)
    weights = torch.randn(2, 4, 1, 3)
    (quantize(z)[0] * weights).sum().backward()
    assert torch.allclose(z.grad, weights)


def test_an_evaluation_sees_codes_even_while_training_does_without():
    quantize, z = VectorQuantizer(codebook_size=16, token_size=4), torch.randn(2, 4, 1, 8)
    codes = quantize.lookup(quantize(z)[1]["min_encoding_indices"]).movedim(-1, 1)
    quantize.bypass = True
    assert not torch.allclose(quantize.train()(z)[0], codes)
    torch.testing.assert_close(quantize.eval()(z)[0], codes)


def test_each_position_may_take_the_first_codes_only_and_the_last_one_all():
    choices = growing_choices(2, num_positions=6, codebook_size=64)
    assert choices == [2, 4, 8, 16, 32, 64]
    quantize = VectorQuantizer(codebook_size=64, token_size=4, choices=choices)
    z = torch.randn(500, 4, 1, 6, requires_grad=True)
    quantized, result = quantize(z)
    codes = result["min_encoding_indices"]
    assert [int(most) < choice for most, choice in zip(codes.amax(dim=(0, 1)), choices, strict=True)] == [True] * 6
    assert all(codes[..., position].unique().numel() > choices[position] // 2 for position in range(6))
    (quantized.square().sum() * 0 + result["quantizer_loss"]).backward()
    assert z.grad.abs().sum() > 0 and quantize.embedding.weight.grad.abs().sum() > 0
    # The last position is quantised as without the bounds.
    free = VectorQuantizer(codebook_size=64, token_size=4)
    free.load_state_dict(quantize.state_dict())
    assert torch.equal(free(z)[1]["min_encoding_indices"][..., -1], codes[..., -1])


def test_a_tokenizer_whose_codebook_grows_is_another_and_keeps_its_weights_names():
    plain, grown = OneDPiece(tiny_config()), OneDPiece(tiny_config(first_codes=2))
    grown.load_state_dict(plain.state_dict())
    assert identity(plain) != identity(grown)
    pixels = torch.rand(3, 3, 16, 16)
    tokens = grown.eval().encode(pixels)[1]["min_encoding_indices"]
    assert (tokens.amax(dim=(0, 1)) < torch.tensor(growing_choices(2, 8, 64))).all()


def test_a_tokenizer_whose_codebook_grows_comes_back_from_its_folder(tmp_path):
    model, pixels = OneDPiece(tiny_config(first_codes=2)).eval(), torch.rand(3, 3, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = OneDPiece.from_pretrained(tmp_path)
    assert identity(loaded) == identity(model)
    tokens = [each.encode(pixels)[1]["min_encoding_indices"] for each in (model, loaded)]
    assert torch.equal(*tokens)


def test_a_codebook_that_does_not_grow_is_as_before():
    for first_codes in (None, 64):
        model = OneDPiece(tiny_config(first_codes=first_codes))
        assert model.quantize.choices is None


@pytest.mark.parametrize("first_codes", [1, 65, -2])
def test_a_first_codebook_larger_than_all_or_of_one_is_refused(first_codes):
    with pytest.raises(UserError, match=rf"first_codes must be in 2..64, the size of the codebook.*got {first_codes}"):
        OneDPiece(tiny_config(first_codes=first_codes))


@pytest.mark.parametrize("length", range(1, 9))
def test_a_length_is_the_prefix_of_the_tokens(length):
    model = OneDPiece(tiny_config()).eval()
    tokens = torch.randint(0, 64, (2, 8))
    with torch.no_grad():
        assert torch.equal(model.decode_tokens(tokens, length=length), model.decode_tokens(tokens[:, :length]))


@pytest.mark.parametrize("length", [0, -1, 9, 2.0, True, "4", [3], [[1, 2]], [0, 4]])
def test_other_lengths_are_errors(length):
    model = OneDPiece(tiny_config()).eval()
    with pytest.raises((ValueError, TypeError)):
        model.decode_tokens(torch.zeros(2, 8, dtype=torch.long), length=length)


def test_titok_demands_all_tokens_unless_told_otherwise():
    z = torch.randn(1, 12, 1, 8)
    with pytest.raises(ValueError, match="needs all of its 8 tokens"):
        TiTok(tiny_config()).decode(z, length=4)
    with pytest.raises(ValueError, match="needs all of its 8 tokens"):
        TiTok(tiny_config()).decode(z[..., :4])
    relaxed = TiTok(tiny_config(strict_length_assertion=False))
    assert relaxed.decode(z, length=4).shape == (1, 3, 16, 16)


def test_bad_images_and_tokens_are_errors():
    model = OneDPiece(tiny_config())
    with pytest.raises(ValueError, match="takes images of shape"):
        model.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="0..63"):
        model.decode_tokens(torch.full((1, 8), 64))
    with pytest.raises(ValueError, match="integers of shape"):
        model.decode_tokens(torch.zeros(1, 8))


@pytest.mark.parametrize("finetune_decoder", [False, True])
def test_one_length_per_image_equals_each_image_alone(finetune_decoder):
    torch.manual_seed(0)
    model = OneDPiece(tiny_config(finetune_decoder=finetune_decoder)).eval()
    tokens, lengths = torch.randint(0, 64, (4, 8)), [1, 3, 8, 5]
    with torch.no_grad():
        together = model.decode_tokens(tokens, length=lengths)
        alone = [model.decode_tokens(row[None], length=length) for row, length in zip(tokens, lengths, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_tail_drop_is_uniform_and_seeded():
    torch.manual_seed(0)
    drawn = torch.cat([draw_lengths("per_batch", 1, 8) for _ in range(8000)])
    counts = torch.bincount(drawn, minlength=9)
    assert counts[0] == 0 and (counts[1:] - 1000).abs().max() < 150
    assert len(set(draw_lengths("per_batch", 64, 8).tolist())) == 1
    assert len(set(draw_lengths("per_sample", 64, 8).tolist())) == 8
    full = (torch.cat([draw_lengths("half_full", 100, 8) for _ in range(50)]) == 8).float().mean()
    assert abs(full - (0.5 + 0.5 / 8)) < 0.03
    assert {int(draw_lengths("powers_of_two", 3, 8)[0]) for _ in range(100)} == {1, 2, 4, 8}
    assert {int(draw_lengths("powers_of_two", 3, 6)[0]) for _ in range(100)} == {1, 2, 4, 6}
    assert draw_lengths("none", 2, 8).tolist() == [8, 8]
    torch.manual_seed(3)
    first = draw_lengths("per_sample", 64, 8)
    torch.manual_seed(3)
    assert torch.equal(first, draw_lengths("per_sample", 64, 8))


def test_tail_drop_is_off_in_evaluation_and_bounded_by_a_given_length():
    model, z = OneDPiece(tiny_config()), torch.randn(2, 12, 1, 8)
    kept = []
    model.decoder.register_forward_pre_hook(lambda decoder, inputs: kept.append(inputs[0].shape[-1]))
    with torch.no_grad():
        model.eval()
        assert torch.equal(model.decode(z), model.decode(z)) and kept == [8, 8]
        model.train()
        for _ in range(50):
            model.decode(z, length=3)
        assert set(kept[2:]) == {1, 2, 3}
        for _ in range(200):
            model.decode(z)
    assert set(kept) == set(range(1, 9))


def test_images_are_decoded_from_a_prefix_and_from_the_whole():
    model, z = OneDPiece(tiny_config(tail_drop="prefix_and_full")), torch.randn(2, 12, 1, 8)
    torch.manual_seed(5)
    both = model.train().decode(z)
    torch.manual_seed(5)
    lengths = draw_lengths("prefix_and_full", 2, 8)
    model.eval()
    assert both.shape[0] == 4
    torch.testing.assert_close(both[:2], model.decode(z, lengths), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[2:], model.decode(z), rtol=1e-4, atol=1e-5)


def test_the_pull_of_the_prefix_moves_the_prefix_only():
    model = OneDPiece(tiny_config(tail_drop="prefix_to_full")).train()
    pixels = torch.rand(2, 3, model.image_size, model.image_size)
    seen = []
    model.decoder.register_forward_hook(lambda decoder, inputs, features: seen.append(features))
    decoded, result = model(pixels)
    seen[0].retain_grad()
    result["prefix_loss"].backward()
    assert decoded.shape[0] == 4 and result["prefix_loss"] > 0
    assert seen[0].grad[:2].abs().sum() > 0 and seen[0].grad[2:].abs().sum() == 0
    assert "prefix_loss" not in model.eval()(pixels)[1]


def test_the_alignment_after_the_first_layer_moves_the_prefix_only():
    model = OneDPiece(tiny_config(tail_drop="prefix_aligned")).train()
    seen = []
    model.decoder.transformer[0].register_forward_hook(lambda block, inputs, features: seen.append(features))
    decoded, result = model(torch.rand(2, 3, 16, 16))
    seen[0].retain_grad()
    result["prefix_loss"].backward()
    gradient = seen[0].grad.abs().sum(dim=-1)  # (4, 1 + 16 + 8)
    assert decoded.shape[0] == 4 and 0 < result["prefix_loss"] < 2
    assert (gradient[:2, 1:17] > 0).all() and gradient[2:].sum() == 0
    assert gradient[:, 0].sum() == 0, "the class token is not aligned"
    assert model.decoder.transformer[1].attn.in_proj_weight.grad is None, "later layers are left alone"


def test_the_alignment_pools_the_latent_tokens_in_use():
    early = torch.randn(2, 1 + 4 + 3, 6)
    early[1, 1:5] = early[0, 1:5]  # equal cells, so that only the pooled latent tokens differ
    early[1, 5:] = early[0, 5]  # their mean is the prefix's one token
    lengths = torch.tensor([1, 3])
    assert float(alignment_loss(early, lengths, 4)) == pytest.approx(0, abs=1e-6)
    early[0, 6:] = 100.0  # not in use
    assert float(alignment_loss(early, lengths, 4)) == pytest.approx(0, abs=1e-6)
    early[0, 5] *= -1
    assert float(alignment_loss(early, lengths, 4)) == pytest.approx(2 / 5, abs=1e-6)


def test_lengths_that_gain_most_are_drawn_most_often():
    gains = LengthGains(8)
    assert gains.weights(0).tolist() == [1 / 8] * 8
    lengths = torch.arange(1, 9)
    losses = torch.tensor([9.0, 5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])  # the second token wins 4, the third and fourth 1
    gains.watch(lengths, losses)
    assert gains.weights(49).tolist() == [1 / 8] * 8, "not before it is time"
    weights = gains.weights(50)
    half = torch.tensor([4, 4, 0.5, 0.5, 0, 0, 0, 0]) / 9 / 2
    torch.testing.assert_close(weights, 1 / 16 + half)
    torch.manual_seed(0)
    drawn = torch.bincount(draw_lengths("prefix_and_full", 20000, 8, weights), minlength=9)[1:] / 20000
    assert (drawn - weights).abs().max() < 0.01


def test_the_weights_of_lengths_are_fetched_only_when_they_change():
    gains = LengthGains(8)
    gains.watch(torch.arange(1, 9), torch.arange(8.0).flip(0))
    fresh = gains.weights(50).clone()
    on_accelerator = gains.state.pop("length_weights")  # to look there is to wait for it
    assert torch.equal(gains.weights(51), fresh)
    gains.state["length_weights"] = on_accelerator
    gains.watch(torch.arange(1, 9), torch.tensor([90.0, *[0.0] * 7]))
    assert not torch.equal(gains.weights(100), fresh)


def test_of_one_token_one_length_is_drawn():
    gains = LengthGains(1)
    gains.watch(torch.tensor([1, 1]), torch.tensor([2.0, 3.0]))
    assert gains.weights(50).tolist() == [1.0]


def test_the_whole_is_decoded_too_where_lengths_are_drawn_by_gain():
    model = OneDPiece(tiny_config(tail_drop="prefix_and_full", length_draw="by_gain")).train()
    model.length_weights = torch.tensor([0, 0, 1.0, 0, 0, 0, 0, 0])
    decoded, result = model(torch.rand(2, 3, 16, 16))
    assert len(decoded) == 4 and result["lengths"].tolist() == [3, 3]
    assert "lengths" not in model.eval()(torch.rand(2, 3, 16, 16))[1]


def test_lengths_are_drawn_by_gain_under_every_rule():
    weights = torch.tensor([0, 0, 1.0, 0, 0, 0, 0, 0])
    for tail_drop in ("per_batch", "per_sample", "prefix_and_full", "prefix_to_full", "prefix_aligned"):
        assert draw_lengths(tail_drop, 4, 8, weights).tolist() == [3, 3, 3, 3]
    assert set(draw_lengths("half_full", 64, 8, weights).tolist()) == {3, 8}
    assert draw_lengths("none", 2, 8, weights).tolist() == [8, 8]
    powers = torch.stack([draw_lengths("powers_of_two", 2, 8, weights + torch.eye(8)[1]) for _ in range(64)])
    assert set(powers.flatten().tolist()) == {2} and (powers[:, 0] == powers[:, 1]).all()
    with pytest.raises(UserError, match="length_draw must be one of uniform, by_gain, got even"):
        OneDPiece(tiny_config(length_draw="even"))


def test_powers_of_two_are_drawn_by_gain_each_as_a_whole_doubling():
    drawn = torch.zeros(256, dtype=torch.bool)
    drawn[powers_of_two(256) - 1] = True
    gains = LengthGains(256, drawn)
    torch.testing.assert_close(gains.weights(0)[drawn], torch.full((9,), 1 / 9))
    lengths = torch.arange(1, 257)
    gains.watch(lengths, 9.0 - torch.tensor([(length - 1).bit_length() for length in lengths.tolist()]))
    weights = gains.weights(50)  # equal gains
    torch.testing.assert_close(weights[drawn], torch.full((9,), 1 / 9))
    assert not weights[~drawn].any()
    gains.watch(lengths, 1000.0 * (lengths < 129))  # all is gained by the last doubling
    weights = gains.weights(100)
    assert float(weights[255]) > 0.5 and bool((weights[drawn] >= 0.5 / 9 - 1e-6).all())


@pytest.mark.parametrize("settings", [{"type": "titok"}, {"tail_drop": "none"}])
def test_lengths_by_gain_where_none_are_drawn_are_refused(settings):
    config = OmegaConf.create(tiny_config(length_draw="by_gain", **{k: v for k, v in settings.items() if k != "type"}))
    config.model.type = settings.get("type", "one_d_piece")
    with pytest.raises(UserError, match="length_draw is for lengths that are drawn"):
        gains_of(build_tokenizer(config))


def test_stage_2_trains_the_decoding_half_only():
    model = OneDPiece(tiny_config()).train()
    output, result = model(torch.rand(2, 3, 16, 16))
    output.square().mean().backward()
    trained = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {"decoder", "pixel_quantize", "pixel_decoder"}
    assert float(result["quantizer_loss"]) == 0


def test_stage_2_trains_the_tokens_too_where_they_are_not_frozen():
    model = OneDPiece(tiny_config(freeze_tokens=False)).train()
    output, result = model(torch.rand(2, 3, 16, 16))
    quantizer_loss = result["quantizer_loss"]
    (output.square().mean() + quantizer_loss).backward()
    untrained = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert untrained == []
    assert float(quantizer_loss.detach()) > 0


def test_half_precision_training_keeps_the_quantizer_in_float32():
    model = OneDPiece(tiny_config(finetune_decoder=False)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_quantized, _ = model.encode(torch.rand(2, 3, 16, 16))
    assert z_quantized.dtype == torch.float32
    assert torch.allclose(z_quantized.norm(dim=1), torch.ones(2, 1, 8), atol=1e-5)


def test_half_precision_works_on_processors_that_have_none():
    torch.manual_seed(0)
    model = OneDPiece(tiny_config()).eval()
    tokens = torch.randint(model.codebook_size, (2, 8))
    with torch.no_grad():
        exact = model.decode_tokens(tokens)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model.decode_tokens(tokens).float()
    assert float((rounded - exact).abs().mean()) < 0.2 * float(exact.std())  # 0.03 to 0.06 by seed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_model_in_another_precision_encodes_and_decodes(stage, dtype):
    torch.manual_seed(0)
    exact = OneDPiece(tiny_config(finetune_decoder=stage == 2)).eval()
    model = copy.deepcopy(exact).to(dtype)
    pixels, tokens = torch.rand(2, 3, 16, 16, dtype=dtype), torch.randint(64, (2, 8))
    with torch.no_grad():
        expected, decoded = exact.decode_tokens(tokens, [3, 8]), model.decode_tokens(tokens, [3, 8])
        assert model(pixels)[0].dtype == decoded.dtype == dtype
    assert float((decoded - expected).abs().mean()) < 0.2 * float(expected.std())


def test_a_teacher_in_half_precision_encodes_and_decodes():
    torch.manual_seed(0)
    teacher = PixelVQGAN(tiny_config()).half().eval()
    pixels = torch.rand(2, 3, 16, 16).half()
    with torch.no_grad():
        assert teacher(pixels)[0].shape == teacher.decode(teacher.encode(pixels)).shape == pixels.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pixels: pixels * 255, r"in \[0, 1\], got 0.* to 25\d.*: divide 0..255 by 255"),
        (lambda pixels: pixels * 2 - 1, r"in \[0, 1\], got -.* to "),
        (lambda pixels: pixels.fill_(float("nan")), r"in \[0, 1\], got nan to nan"),
        (lambda pixels: (pixels * 255).byte(), "floating-point in .*got torch.uint8"),
        (lambda pixels: pixels.double(), "pixels are torch.float64 and the weights torch.float32"),
        (lambda pixels: pixels.half(), "pixels are torch.float16 and the weights torch.float32"),
        (lambda pixels: pixels.numpy(), "takes a tensor, got ndarray"),
    ],
)
def test_what_are_no_pixels_gives_no_tokens(change, message):
    model = OneDPiece(tiny_config()).eval()
    with pytest.raises(UserError, match=message):
        model.encode(change(torch.rand(2, 3, 16, 16)))


def test_an_empty_batch_gives_an_empty_result():
    model = OneDPiece(tiny_config()).eval()
    with torch.no_grad():
        z_quantized, result = model.encode(torch.rand(0, 3, 16, 16))
        assert result["min_encoding_indices"].shape == (0, 1, 8)
        assert model.decode(z_quantized, length=3).shape == model.decode(z_quantized).shape == (0, 3, 16, 16)
        assert model.decode_tokens(torch.zeros(0, 8, dtype=torch.long)).shape == (0, 3, 16, 16)


def test_what_are_no_tokens_and_no_length_is_one_sentence():
    model = OneDPiece(tiny_config()).eval()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    for arguments in ((None,), (["a"],), ([[1], [1, 2]],), (tokens, "4"), (tokens, [None])):
        with pytest.raises(UserError, match="(tokens|length) must be integers, got "):
            model.decode_tokens(*arguments)


def test_tokens_may_be_numpys():
    model = OneDPiece(tiny_config()).eval()
    tokens = np.arange(8, dtype=np.uint16)[None]
    with torch.no_grad():
        assert torch.equal(model.decode_tokens(tokens), model.decode_tokens(torch.arange(8)[None]))
