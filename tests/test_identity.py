"""The identity of a tokenizer: the same for what makes the same tokens, another for everything else."""

import copy

import pytest
import torch
from omegaconf import OmegaConf

from modeling.identity import former_fingerprint, has_mean_code, identity
from modeling.one_d_piece import OneDPiece
from modeling.titok import TiTok
from tests.checkpoint_data import tokenizer_config
from tests.fill import fill

# In files that exist: these must never change.
BUNDLED = {
    "one-d-piece_fashion": "030ca435b1801cf70f966884314b827eb159c3ca3a18d4c69fe522e83305df12",
    "one-d-piece_emoji": "3653c55d3ad3f09a53a62dd89e25a5879887f8837ff338e672b6add058a10328",
}
FORMER = {
    "one-d-piece_fashion": "d00aae8e9e4198cc831e687090f4545c2b70023ad37ac97223a3eddebf793fad",
    "one-d-piece_emoji": "e5b415f13507842d3926fb0df3083602c98888169be99fcbe639f75189d1f366",
}


def tokenizer(seed=0, kind=OneDPiece, **vq_model):
    return fill(kind(OmegaConf.create(tokenizer_config(**vq_model))), seed)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_tokenizers_are_who_they_were(name):
    model = OneDPiece.from_pretrained(name)
    assert identity(model) == BUNDLED[name] and former_fingerprint(model) == FORMER[name]


def test_a_copy_in_half_precision_is_the_same_tokenizer(tmp_path):
    model = tokenizer()
    model.save_pretrained(tmp_path, dtype=torch.float16)
    loaded = OneDPiece.from_pretrained(tmp_path)
    assert not torch.equal(loaded.latent_tokens, model.latent_tokens)
    assert identity(loaded) == identity(model) == identity(copy.deepcopy(model).half()) == identity(model.double())


def test_a_copy_in_bfloat16_is_another(tmp_path):
    model = tokenizer()
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert identity(OneDPiece.from_pretrained(tmp_path)) != identity(model)


def test_weights_next_to_zero_are_those_of_the_copy():
    model = tokenizer()
    model.latent_tokens.data[0] = 2.0 ** -torch.arange(15.0, 31.0).repeat(12)  # float16 is subnormal from 2^-15 on
    model.latent_tokens.data[1] = -model.latent_tokens.data[0] * 1.3
    assert identity(copy.deepcopy(model).half()) == identity(model)


def test_a_copy_that_overflowed_is_another():
    model = tokenizer()
    model.latent_tokens.data[0, 0] = 65519.0
    assert identity(copy.deepcopy(model).half()) == identity(model)
    model.latent_tokens.data[0, 0] = 65520.0
    assert identity(copy.deepcopy(model).half()) != identity(model)


def test_the_decoder_and_the_class_make_no_tokens():
    model = tokenizer()
    before = identity(model)
    model.decoder.mask_token.data += 1
    model.pixel_quantize.embedding.weight.data += 1
    assert identity(model) == before
    assert identity(tokenizer(finetune_decoder=False)) == before
    assert identity(tokenizer(kind=TiTok)) == before


@pytest.mark.parametrize(
    "name",
    [
        "latent_tokens",
        "quantize.embedding.weight",
        "encoder.positional_embedding",
        "encoder.patch_embed.bias",
        "encoder.transformer.3.mlp.c_fc.weight",
        "encoder.conv_out.weight",
    ],
)
def test_every_weight_that_makes_tokens_counts(name):
    model = tokenizer()
    before = identity(model)
    model.state_dict()[name].view(-1)[-1] += 1e-2
    assert identity(model) != before


@pytest.mark.parametrize("setting", [{"is_legacy": False}, {"use_l2_norm": False}, {"num_latent_tokens": 5}])
def test_every_setting_that_makes_tokens_counts(setting):
    assert identity(tokenizer(**setting)) != identity(tokenizer())


def test_heads_and_sizes_count_where_the_weights_have_the_same_shapes():
    model, seen = tokenizer(), set()
    seen.add(identity(model))
    model.encoder.transformer[0].attn.num_heads = 4
    seen.add(identity(model))
    model.image_size = 32
    seen.add(identity(model))
    model.encoder.patch_embed.kernel_size = (8, 8)
    seen.add(identity(model))
    assert len(seen) == 4


def test_another_training_is_another_tokenizer():
    assert identity(tokenizer(0)) != identity(tokenizer(1))


def test_the_former_rules_see_what_they_saw():
    model, other = tokenizer(0), tokenizer(1)
    mean_code = [round(value, 6) for value in model.quantize.embedding.weight.detach().mean(dim=0).tolist()]
    half = copy.deepcopy(model).half().float()
    assert has_mean_code(model, mean_code) and has_mean_code(half, mean_code) and not has_mean_code(other, mean_code)
    assert not has_mean_code(model, mean_code[1:])
    assert former_fingerprint(half) != former_fingerprint(model) != former_fingerprint(other)
