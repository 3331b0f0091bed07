"""What every sampler promises, in one contract that each registered one is held to; its settings and schedules."""

import argparse
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from modeling.maskgit import ImageBert, UViTBert
from modeling.modules.masking import ImageNoise
from modeling.samplers import SAMPLERS, sampler_class
from modeling.samplers.settings import (
    ORDERS,
    REMASKINGS,
    SAMPLER_FLAGS,
    SamplerSettings,
    guidance_weight,
    masked_counts,
    sampler_settings,
)
from tests.apple_gpu import AppleGPU
from tests.fill import integers
from tests.test_maskgit import CLASSES, CONFIGS, MASK, nested, small
from utils.errors import UserError
from utils.flags import add_fields, given_fields

CPU = torch.device("cpu")
OPTIONS = {"top_p": 0.9, "mask_schedule": "exponential", "guidance_from": 0.3, "guidance_until": 0.8}
SETTINGS = [
    {"sampler": "confidence"},
    {"sampler": "confidence", "temperature_decay": "constant", **OPTIONS},
    {"sampler": "choose", "order": "random", **OPTIONS},
    {"sampler": "choose", "order": "front"},
    {"sampler": "choose", "order": "moment"},
    {"sampler": "remasking", "remasking": "cap", "order": "front"},
    {"sampler": "remasking", "remasking": "rescale", "remasking_strength": 0.5, "order": "moment"},
    {"sampler": "remasking", "remasking": "loop", **OPTIONS},
]
every_sampler = pytest.mark.parametrize("sampler", SETTINGS, ids=lambda each: "-".join(map(str, each.values()))[:24])
both_networks = pytest.mark.parametrize("network", [ImageBert, UViTBert])


# The contract


@every_sampler
@both_networks
def test_an_image_is_the_same_alone_and_in_a_batch(network, sampler):
    model = small(network)
    labels = [0, 3, 7, 9, 9]
    seeds = list(range(100, 105))
    together = model.generate(labels, seeds=seeds, **sampler)
    alone = [model.generate([label], seeds=[seed], **sampler) for label, seed in zip(labels, seeds, strict=True)]
    assert torch.equal(together, torch.cat(alone))

    together = model.generate(labels, generator=torch.Generator().manual_seed(0), **sampler)
    one_by_one = torch.Generator().manual_seed(0)
    alone = [model.generate([label], generator=one_by_one, **sampler) for label in labels]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[3], together[4])  # the same class, other noise


@every_sampler
@both_networks
def test_sampling_repeats_from_the_global_seed_and_differs_without_it(network, sampler):
    model = small(network)
    torch.manual_seed(3)
    first, second = (model.generate([1, 2], **sampler) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, model.generate([1, 2], **sampler))
    assert not torch.equal(first, second)


@every_sampler
@both_networks
def test_without_noise_the_seed_does_not_matter(network, sampler):
    model = small(network)
    first, second = (
        model.generate(CLASSES, seeds=range(start, start + 6), randomize_temperature=0, **sampler) for start in (0, 100)
    )
    assert torch.equal(first, second)


@every_sampler
@pytest.mark.parametrize("temperature", [0.0, 4.5])
@pytest.mark.parametrize("steps", [1, 7, 32, 40])
def test_every_position_is_filled_after_the_last_step(steps, temperature, sampler):
    tokens, after = small().generate(
        CLASSES,
        num_sample_steps=steps,
        randomize_temperature=temperature,
        return_intermediate=True,
        **sampler,
    )
    assert tokens.shape == (6, 32) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < MASK
    assert after.shape == (steps, 6, 32) and torch.equal(after[-1], tokens)
    assert after.min() >= 0 and after.max() <= MASK


@every_sampler
def test_sampling_neither_changes_the_mode_nor_its_inputs_nor_keeps_gradients(sampler):
    model = small().train()
    labels = torch.tensor([1, 2])
    first, second = (model.generate(labels, seeds=[0, 1], **sampler) for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert model.training and all(module.training for module in model.modules())
    assert labels.tolist() == [1, 2] and not first.requires_grad
    with pytest.raises(UserError):
        model.generate(labels, guidance_decay="none", **sampler)
    assert model.training


@every_sampler
def test_a_step_leaves_logits_and_the_state_before_it_as_they_were(sampler):
    settings = SamplerSettings(num_sample_steps=4, **sampler)
    method = sampler_class(settings.sampler)(settings, num_tokens=8, codebook_size=16)
    state = method.start(torch.empty(2, 0, dtype=torch.long), ImageNoise([0, 1], CPU))
    while state.step < 4:
        logits = torch.randn(*state.positions.shape, 16)
        before = [logits.clone(), state.tokens.clone(), state.positions.clone()]
        after = method.step(logits, state)
        assert all(map(torch.equal, before, [logits, state.tokens, state.positions]))
        assert after.step == state.step + 1 and (after.positions.diff(dim=1) > 0).all()
        state = after


@every_sampler
@both_networks
def test_a_prefix_stays_and_the_rest_is_sampled(network, sampler):
    model = small(network)
    prefix = integers(3, "prefix", (4, 5), 0, MASK)
    seeds = range(4)
    for labels in ([1, 2, 3, 3], None):
        tokens, after = model.generate(labels, seeds=seeds, prefix=prefix, return_intermediate=True, **sampler)
        assert (after[..., :5] == prefix).all() and (tokens < MASK).all()
        one = None if labels is None else labels[2:3]
        assert torch.equal(model.generate(one, seeds=[2], prefix=prefix[2:3], **sampler), tokens[2:3])
    assert len(torch.unique(tokens[:, 5:], dim=0)) == 4


@every_sampler
@both_networks
def test_a_draft_has_the_first_tokens_alone(network, sampler):
    model = small(network)
    drafts = model.generate([1, 2], seeds=[0, 1], num_tokens=5, **sampler)
    assert drafts.shape == (2, 5) and drafts.max() < MASK
    whole = model.generate([1, 2], seeds=[0, 1], prefix=drafts, **sampler)
    assert whole.shape == (2, 32) and torch.equal(whole[:, :5], drafts)
    longer = model.generate([1, 2], seeds=[0, 1], prefix=drafts, num_tokens=9, **sampler)
    assert longer.shape == (2, 9) and torch.equal(longer[:, :5], drafts)


@pytest.mark.parametrize("num_tokens", [5, 32])
def test_a_draft_takes_as_many_passes_as_its_settings_say(num_tokens):
    settings = SamplerSettings(num_sample_steps=40, num_tokens=num_tokens)
    _, after = small(ImageBert).generate([1], seeds=[0], return_intermediate=True, **asdict(settings))
    assert len(after) == settings.num_passes == num_tokens


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_code_of_no_probability_is_drawn(sampler):
    settings = SamplerSettings(num_sample_steps=4, top_p=1e-6, randomize_temperature=100, sampler=sampler)
    method = sampler_class(sampler)(settings, num_tokens=8, codebook_size=16)
    state = method.start(torch.empty(2, 0, dtype=torch.long), ImageNoise([0, 1], CPU))
    while state.step < 4:
        logits = torch.zeros(*state.positions.shape, 16)
        logits[..., 3] = 0.01
        state = method.step(logits, state)
    assert (state.tokens == 3).all()


# Choose, then sample


def test_front_to_back_sets_the_first_tokens_first():
    _, after = small().generate(CLASSES, sampler="choose", order="front", return_intermediate=True)
    for tokens in after:
        masked = tokens == MASK
        assert (masked.sum(dim=1) == masked[0].sum()).all() and masked[:, 32 - masked[0].sum() :].all()


@pytest.mark.parametrize("order", ORDERS)
def test_plain_sampling_draws_codes_as_often_as_their_softmax_says(order):
    settings = SamplerSettings(
        sampler="choose", order=order, num_sample_steps=1, randomize_temperature=2, temperature_decay="constant"
    )
    method = sampler_class("choose")(settings, num_tokens=1, codebook_size=4)
    state = method.start(torch.empty(2000, 0, dtype=torch.long), ImageNoise(range(2000), CPU))
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    tokens = method.step(shares.log().expand(2000, 1, 4), state).tokens
    found = torch.bincount(tokens.flatten(), minlength=4) / 2000
    torch.testing.assert_close(found, shares, atol=0.03, rtol=0)


def test_the_moment_order_draws_as_the_published_sampler_does():
    """The first token of 64, of which every other one is surer: where and what it is."""
    rows = torch.tensor([[3.0, 0, 0, 0], [1.0, 0.5, 0, 0]]).log_softmax(-1)
    options = {"num_sample_steps": 60, "randomize_temperature": 1.5, "temperature_decay": "constant"}
    found = {}
    for sampler in ("confidence", "choose"):
        settings = SamplerSettings(sampler=sampler, order="moment", **options)
        method = sampler_class(sampler)(settings, num_tokens=64, codebook_size=4)
        state = method.start(torch.empty(2000, 0, dtype=torch.long), ImageNoise(range(2000), CPU))
        tokens = method.step(rows.repeat(32, 1).expand(2000, 64, 4), state).tokens
        positions = (tokens < 4).nonzero()[:, 1]
        assert len(positions) == 2000
        codes = tokens[tokens < 4]
        found[sampler] = torch.bincount(positions % 2 * 4 + codes, minlength=8) / 2000
    torch.testing.assert_close(found["choose"], found["confidence"], atol=0.03, rtol=0)


# Remasking


@pytest.mark.parametrize("kind", REMASKINGS)
def test_remasking_draws_known_tokens_again_and_no_more_than_are_to_be_masked(kind):
    settings = {"sampler": "remasking", "remasking": kind, "remasking_strength": 0.5, "num_sample_steps": 12}
    _, after = small().generate(CLASSES, seeds=range(6), return_intermediate=True, **settings)
    masked = after == MASK
    forgotten = masked[1:] & ~masked[:-1]
    assert forgotten.any() and not masked[-1].any()
    counts = masked.sum(dim=2)
    assert (counts == counts[:, :1]).all()  # as many in each image
    assert (forgotten.sum(dim=2) <= counts[1:]).all()
    if kind == "loop":
        assert not forgotten[:5].any() and (counts[5:-1] == 3).all()
    else:
        assert counts[:, 0].tolist() == masked_counts(32, 12)


def test_without_strength_remasking_is_choose_then_sample():
    model = small()
    chosen = model.generate(CLASSES, seeds=range(6), sampler="choose")
    assert torch.equal(chosen, model.generate(CLASSES, seeds=range(6), sampler="remasking", remasking_strength=0))


@every_sampler
@both_networks
def test_sampling_needs_no_float64_on_the_device(network, sampler):
    with AppleGPU():
        tokens = small(network).generate([1, 2], seeds=[1, 2], guidance_decay="power-cosine", **sampler)
    assert tokens.shape == (2, 32)


# The published sampler


@pytest.mark.parametrize("temperature", [0.0, 4.5])
@pytest.mark.parametrize("steps", [7, 32, 40])
def test_by_confidence_known_tokens_never_change(steps, temperature):
    _, after = small().generate(
        CLASSES, num_sample_steps=steps, randomize_temperature=temperature, return_intermediate=True
    )
    for earlier, later in zip(after, after[1:], strict=False):
        known = earlier != MASK
        assert torch.equal(later[known], earlier[known])
        assert ((later == MASK).sum(dim=1) <= known.logical_not().sum(dim=1)).all()


# Settings and flags


def test_published_samplers_come_from_their_configs():
    settings = sampler_settings(nested(CONFIGS["generator_titok_s128 (sampling)"]))
    assert settings == SamplerSettings(
        guidance_scale=6.9, guidance_decay="power-cosine", randomize_temperature=2.8, num_sample_steps=64
    )
    assert settings.sampler == "confidence"  # as it does not say
    assert "num_sample_steps 64" in str(settings)


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_fields(parser, SamplerSettings, SAMPLER_FLAGS)
    return given_fields(parser.parse_args(arguments), SamplerSettings)


def test_settings_print_what_the_sampler_uses_and_what_is_not_off():
    assert str(SamplerSettings(guidance_scale=0, top_p=0.9)) == (
        "sampler confidence, randomize_temperature 4.5, num_sample_steps 8, temperature_decay linear, top_p 0.9, "
        "mask_schedule arccos"
    )
    assert str(SamplerSettings(sampler="choose", randomize_temperature=0)) == (
        "sampler choose, guidance_scale 3.0, num_sample_steps 8, mask_schedule arccos, order random"
    )
    settings = str(SamplerSettings(sampler="remasking", guidance_decay="power-cosine", num_tokens=4))
    for shown in ("guidance_scale_pow 3.0", "remasking cap, remasking_strength 0.1, num_tokens 4"):
        assert shown in settings


@pytest.mark.parametrize(
    ("changed", "warned"),
    [({}, True), ({"sampler": "choose"}, True), ({"sampler": "remasking"}, False), ({"num_tokens": 4}, False)],
)
def test_more_passes_than_tokens_are_warned_of_where_they_lose(changed, warned):
    settings = SamplerSettings(num_sample_steps=9, **changed)
    assert ("9 passes for 8 tokens" in settings.caution(8)) is warned
    assert settings.caution(9) == ""


def test_every_setting_is_a_flag_and_those_given_change_the_configuration():
    config = nested(CONFIGS["generator_titok_s128 (sampling)"])
    given = parsed("--guidance_scale", "0", "--softmax_temperature_annealing", "--num_sample_steps", "5")
    assert given == {"guidance_scale": 0, "softmax_temperature_annealing": True, "num_sample_steps": 5}
    expected = replace(sampler_settings(config), **given)
    assert sampler_settings(config, **given) == expected and expected.randomize_temperature == 2.8
    assert parsed("--softmax_temperature_annealing", "false") == {"softmax_temperature_annealing": False}
    flags = [word for name, value in asdict(SamplerSettings()).items() for word in (f"--{name}", str(value))]
    assert SamplerSettings(**parsed(*flags)) == SamplerSettings()


def test_a_flag_of_a_wrong_kind_is_refused(capsys):
    for flags, message in (
        (("--guidance_decay", "cosine"), "invalid choice: 'cosine'"),
        (("--softmax_temperature_annealing", "yes"), "expected true or false, got yes"),
        (("--num_sample_steps", "2.5"), "invalid int value"),
    ):
        with pytest.raises(SystemExit):
            parsed(*flags)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_sample_steps": 0}, "num_sample_steps must be an integer of 1 or more, got 0"),
        ({"num_sample_steps": 2.5}, "got 2.5"),
        ({"num_sample_steps": "8"}, "num_sample_steps must be an integer, got '8'"),
        ({"softmax_temperature_annealing": "false"}, "must be true or false, got 'false'"),
        ({"randomize_temperature": float("inf")}, "randomize_temperature must be a finite number"),
        ({"randomize_temperature": None}, "randomize_temperature must be a finite number .*, got None"),
        ({"randomize_temperature": torch.ones(2)}, "randomize_temperature must be a finite number"),
        ({"guidance_scale": 1e300}, "guidance_scale must be a finite number of float32, got 1e"),
        ({"guidance_scale": True}, "guidance_scale must be a finite number of float32, got True"),
        ({"guidance_decay": ["linear"]}, "guidance_decay must be a name"),
        ({"guidance_decay": "cosine"}, "guidance_decay must be one of constant, linear, power-cosine"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"guidance_scale_pow": -1}, "guidance_scale_pow must be a finite number of 0 or more"),
        ({"randomize_temperature": -1}, "randomize_temperature must be a finite number of 0 or more"),
        ({"top_p": 0}, "top_p must be more than 0"),
        ({"top_p": 1.5}, r"top_p must be in 0\.\.1, got 1.5"),
        ({"guidance_from": -1}, r"guidance_from must be in 0\.\.1"),
        ({"order": "back"}, "order must be one of random, front, moment, got 'back'"),
        ({"num_tokens": 33}, "num_tokens must be at most 32, got 33"),
        ({"num_tokens": -1}, "num_tokens must be an integer of 0 or more, got -1"),
        ({"prefix": torch.zeros(1, 32, dtype=torch.long)}, r"shape \(1, K\), K under 32, got \(1, 32\)"),
        ({"prefix": torch.zeros(2, 3, dtype=torch.long)}, r"shape \(1, K\), K under 32, got \(2, 3\)"),
        ({"prefix": torch.full((1, 3), MASK)}, r"tokens of a prefix must be in 0\.\.63"),
        ({"prefix": torch.zeros(1, 3)}, "tokens of a prefix must be integers"),
        ({"sampler": "guess"}, "sampler must be one of confidence, choose, remasking, got guess"),
        ({"sampler": []}, r"sampler must be a name, got \[\]"),
        ({"seeds": [1, 2]}, "one an image, got 2 for 1"),
        ({"seeds": [2**64]}, r"seeds must be in 0..2\*\*64 - 1, got 18446744073709551616"),
        ({"seeds": [-1]}, r"seeds must be in 0..2\*\*64 - 1, got -1"),
        ({"seeds": [1.5]}, "seeds must be integers, one an image"),
        ({"seeds": 1}, "seeds must be integers, one an image, got 1"),
        ({"generator": 1}, "generator must be a torch.Generator, got 1"),
        ({"seeds": [1], "generator": torch.Generator()}, "got both"),
    ],
)
def test_wrong_sampler_settings_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        small().generate([1], **settings)


@pytest.mark.parametrize("labels", [None, "abc", ["a"], [2**70], [[1], [1, 2]], [1.0], 3])
def test_labels_that_are_no_row_of_integers_are_refused(labels):
    with pytest.raises(UserError, match="class labels must"):
        small().generate(labels)


@every_sampler
@pytest.mark.parametrize("network", [ImageBert, UViTBert])
def test_no_labels_give_no_images(network, sampler):
    for labels in ([], torch.empty(0, dtype=torch.int64)):
        tokens, after = small(network).generate(labels, num_sample_steps=3, return_intermediate=True, **sampler)
        assert tokens.shape == (0, 32) and tokens.dtype == torch.int64
        assert after.shape == (3, 0, 32)


def test_numbers_of_numpy_and_torch_are_numbers():
    settings = SamplerSettings(
        guidance_scale=np.float32(2), randomize_temperature=torch.tensor(1.5), num_sample_steps=np.int64(3)
    )
    assert str(settings) == str(SamplerSettings(guidance_scale=2.0, randomize_temperature=1.5, num_sample_steps=3))
    model = small()
    expected = model.generate([1, 2], seeds=[3, 2**64 - 1])
    for seeds in (np.array([3, 2**64 - 1], dtype=np.uint64), [torch.tensor(3), 2**64 - 1]):
        assert torch.equal(model.generate(np.array([1, 2]), seeds=seeds), expected)


def test_sampling_masks_the_arccos_share_of_tokens():
    for num_tokens, num_steps in ((256, 16), (128, 64), (32, 8)):
        counts = masked_counts(num_tokens, num_steps)
        assert len(counts) == num_steps and counts[-1] == 0
        for step, count in enumerate(counts[:-1], start=1):
            scheduled = math.floor(num_tokens * math.acos(step / num_steps) * 2 / math.pi)
            previous = counts[step - 2] if step > 1 else num_tokens
            assert count == max(1, min(scheduled, previous - 1))


def test_sampling_fixes_a_token_in_every_step_while_there_are_enough():
    assert masked_counts(4, 1) == [0]
    assert masked_counts(4, 4) == [3, 2, 1, 0]
    assert masked_counts(2, 5) == [1, 1, 1, 1, 0]


def test_the_exponential_schedule_leaves_more_for_the_end():
    assert masked_counts(32, 8, "exponential") == [31, 30, 29, 28, 27, 22, 14, 0]
    published = masked_counts(32, 8)
    assert all(later >= early for later, early in zip(masked_counts(32, 8, "exponential"), published, strict=True))


def test_guidance_acts_in_its_interval_alone():
    settings = SamplerSettings(guidance_scale=4, num_sample_steps=4, guidance_from=0.25, guidance_until=0.75)
    assert [settings.guidance_weight(step) for step in range(4)] == [0, 4, 4, 0]


def test_guidance_weights_in_closed_form():
    assert [guidance_weight("constant", 4.5, 3, step, 4) for step in range(4)] == [4.5] * 4
    assert [guidance_weight("linear", 4, 3, step, 4) for step in range(4)] == [0, 1, 2, 3]
    assert guidance_weight("power-cosine", 5, 3, 0, 8) == 0
    assert guidance_weight("power-cosine", 5, 1, 4, 8) == pytest.approx(2)  # half of 5 - 1, at half of the way
    assert guidance_weight("power-cosine", 5, 3, 4, 8) == pytest.approx(2 * (1 - math.cos(math.pi / 8)))
    assert guidance_weight("power-cosine", 0, 3, 4, 8) < 0  # a scale of 0 is less guidance than none


def test_an_unknown_decay_is_an_error():
    with pytest.raises(UserError, match="power-cosine, got 'cosine'"):
        guidance_weight("cosine", 1, 3, 0, 8)
