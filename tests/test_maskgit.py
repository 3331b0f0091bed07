"""The generators: published names and numbers, and a sampler that keeps its word."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from modeling.maskgit import ImageBert, UViTBert, generator_class
from modeling.modules.masking import gumbel
from tests.fill import assert_close, fill, integers
from utils.errors import UserError

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "facts" / "state_dicts.json").read_text())
CONFIGS = json.loads((HERE / "facts" / "configs.json").read_text())
NETWORKS = {"ImageBert": ImageBert, "UViTBert": UViTBert}
SAMPLES = np.load(HERE / "golden" / "generate_bert_small.npz")
CLASSES = [0, 3, 4, 7, 8, 9]
MASK = 64


def small_config(**generator):
    return {
        "model": {
            "vq_model": {"codebook_size": MASK},
            "generator": {
                "hidden_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "intermediate_size": 256,
                "image_seq_len": 32,
                "condition_num_classes": 10,
                **generator,
            },
        }
    }


def small(network=ImageBert, **generator):
    return fill(network(small_config(**generator)), 0).eval()


def golden_inputs():
    ids = integers(14, "ids", (3, 32), 0, 64)
    ids[integers(14, "masked", (3, 32), 0, 2) == 1] = MASK
    return ids, integers(14, "classes", (3,), 0, 10)


def nested(flat):
    return OmegaConf.from_dotlist([f"{key}={json.dumps(value)}" for key, value in flat.items()])


def count_forwards(model):
    batches = []
    model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    return batches


@pytest.mark.parametrize("name", [name for name in FACTS if name.startswith(tuple(NETWORKS))])
def test_names_and_shapes_are_the_published_ones(name):
    network, config = name.split(":")
    with torch.device("meta"):
        model = NETWORKS[network](nested(CONFIGS[f"training/generator/{config}"]))
    shapes = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert sorted(shapes) == sorted(FACTS[name]["state"])
    assert sum(parameter.numel() for parameter in model.parameters()) == FACTS[name]["parameters"]


def test_published_networks_come_from_their_configs():
    assert generator_class(nested(CONFIGS["generator_titok_s128 (sampling)"])) is UViTBert
    assert generator_class(nested(CONFIGS["generator_titok_l32 (sampling)"])) is ImageBert
    with pytest.raises(UserError, match="ViT, UViT, got DiT"):
        generator_class(OmegaConf.create(small_config(model_type="DiT")))


@pytest.mark.parametrize("network, file", [(ImageBert, "bert_small"), (UViTBert, "uvit_small")])
def test_logits_are_the_published_ones(network, file):
    golden = np.load(HERE / "golden" / f"{file}.npz")
    model = small(network)
    ids, classes = golden_inputs()
    given = classes.clone()
    with torch.no_grad():
        assert_close(model(ids, classes, 0.0), golden, "logits[drop=0.0]")
        assert_close(model(ids, classes, cond_drop_prob=1.0), golden, "logits[drop=1.0]")
        assert_close(model(ids[:, None], classes, 0.0), golden, "logits[3d ids]")
    assert torch.equal(classes, given)


@pytest.mark.parametrize("key", [key for key in SAMPLES.files if f"{key}__margin" in SAMPLES.files])
def test_generated_tokens_are_the_published_ones(key):
    decay, scale, steps, *variant = key.split("_")
    tokens = small().generate(
        torch.tensor(CLASSES),
        guidance_scale=float(scale),
        guidance_decay=decay,
        guidance_scale_pow=1.0 if variant == ["pow1"] else 3.0,
        randomize_temperature=0,
        softmax_temperature_annealing=variant == ["anneal"],
        num_sample_steps=int(steps),
    )
    clear = SAMPLES[f"{key}__margin"] >= 5e-4
    assert clear.any()
    np.testing.assert_array_equal(tokens.numpy()[clear], SAMPLES[key][clear])


@pytest.mark.parametrize("network", [ImageBert, UViTBert])
def test_initial_values(network):
    model = network(small_config(hidden_size=128))
    bound = 10 if network is ImageBert else 2.0  # truncated normals are cut at +-2, far from 0.02
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert parameter.abs().max() < bound
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("network", [ImageBert, UViTBert])
def test_every_parameter_learns_and_dropout_acts_in_training_only(network):
    """In ImageBert's training: a UViT drops nothing out, as published."""
    model = small(network)
    ids, classes = golden_inputs()
    assert torch.equal(model(ids, classes, 0.0), model(ids, classes, 0.0))
    model.train()
    first, second = model(ids, classes, 0.0), model(ids, classes, 0.0)
    assert torch.equal(first, second) == (network is UViTBert)
    first.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_classes_are_dropped_by_chance_or_as_told():
    model = small()
    ids, classes = golden_inputs()
    with torch.no_grad():
        kept, dropped = model(ids, classes, 0.0), model(ids, classes, 1.0)
        told = model(ids, classes, torch.tensor([False, True, False]))
        torch.testing.assert_close(told, torch.stack([kept[0], dropped[1], kept[2]]))
        torch.manual_seed(0)
        same_as_kept = (model(ids[:1].repeat(400, 1), classes[:1].repeat(400)) - kept[0]).abs().amax(dim=(1, 2)) < 1e-3
    assert 0.85 < same_as_kept.float().mean() < 0.95


@pytest.mark.parametrize("network", [ImageBert, UViTBert])
def test_logits_at_some_positions_are_those_of_all_positions_there(network):
    model = small(network)
    ids, classes = golden_inputs()
    positions = torch.tensor([[0, 5, 31], [1, 2, 3], [30, 7, 7]])
    with torch.no_grad():
        some = model(ids, classes, 0.0, positions)
        everywhere = model(ids, classes, 0.0)
    expected = torch.stack([row[places] for row, places in zip(everywhere, positions, strict=True)])
    torch.testing.assert_close(some, expected)


def test_the_unconditional_half_is_left_out_where_it_has_no_weight():
    batches = count_forwards(model := small())

    def sizes(**settings):
        batches.clear()
        model.generate([1, 2], num_sample_steps=4, **settings)
        return list(batches)

    assert sizes(guidance_scale=0) == [2, 2, 2, 2]
    assert sizes(guidance_scale=3) == [4, 4, 4, 4]
    assert sizes(guidance_scale=3, guidance_decay="linear") == [2, 4, 4, 4]
    assert sizes(guidance_scale=3, guidance_decay="power-cosine") == [2, 4, 4, 4]
    assert sizes(guidance_scale=1, guidance_decay="power-cosine") == [2, 2, 2, 2]


def test_guidance_noise_and_choice_stay_in_float32_under_autocast(monkeypatch):
    model, dtypes = small(), set()

    def recording(function):
        def wrapped(*inputs):
            result = function(*inputs)
            dtypes.add(result.dtype)
            return result

        return wrapped

    monkeypatch.setattr("modeling.samplers.confidence.gumbel", recording(gumbel))
    monkeypatch.setattr(model, "_guided_logits", recording(model._guided_logits))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(*golden_inputs(), 0.0).dtype == torch.bfloat16
        model.generate(CLASSES)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 10], "0..9, got 0..10"),
        ([-1], "0..9, got -1..-1"),
        ([1.0], "must be integers"),
        ([[1, 2]], r"shape \(B,\)"),
    ],
)
def test_labels_outside_the_classes_are_errors(labels, message):
    model = small()
    with pytest.raises(UserError, match=message):
        model.generate(torch.tensor(labels))
    with pytest.raises(UserError, match=message):
        model(torch.zeros(len(labels), 32, dtype=torch.long), torch.tensor(labels))


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.full((1, 32), MASK + 1), "0..64"),
        (torch.full((1, 32), -1), "0..64"),
        (torch.zeros(1, 31, dtype=torch.long), r"\(B, 32\)"),
        (torch.zeros(1, 33, dtype=torch.long), r"\(B, 32\)"),
        (torch.zeros(2, 32, dtype=torch.long), r"and 1 labels"),
        (torch.zeros(1, 2, 32, dtype=torch.long), r"\(B, 1, 32\)"),
        (torch.zeros(1, 32), "must be integers"),
    ],
)
def test_wrong_image_tokens_are_errors(ids, message):
    with pytest.raises(UserError, match=message):
        small()(ids, torch.tensor([1]))


def test_impossible_sizes_are_errors():
    with pytest.raises(UserError, match="multiple of num_attention_heads = 5"):
        ImageBert(small_config(num_attention_heads=5))
    with pytest.raises(UserError, match="must be even"):
        UViTBert(small_config(num_hidden_layers=3))
    config = small_config()
    del config["model"]["generator"]["image_seq_len"]
    with pytest.raises(UserError, match="image_seq_len"):
        ImageBert(config)
    config["model"]["vq_model"]["num_latent_tokens"] = 8
    assert ImageBert(config).num_tokens == 8


@pytest.mark.parametrize("network", [ImageBert, UViTBert])
def test_weights_are_saved_and_read_back_to_the_same_numbers(network, tmp_path):
    model = fill(network(small_config(model_type="ViT" if network is ImageBert else "UViT")), 0).eval()
    model.save_pretrained(tmp_path / "generator")
    again = network.from_pretrained(tmp_path / "generator")
    ids, classes = golden_inputs()
    with torch.no_grad():
        assert torch.equal(model(ids, classes, 0.0), again(ids, classes, 0.0))
