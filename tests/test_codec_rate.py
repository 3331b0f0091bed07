"""How many tokens are kept: options, goals, budgets, tiles, and lengths that are guessed."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from codec import length
from codec.rate import (
    Goal,
    Options,
    best_within,
    choose,
    curves,
    encode,
    goal_of,
    lower_hull,
    psnr_of,
    smallest_reaching,
    smallest_seen,
    spread,
    squared_error,
    tile_lengths,
    tried_lengths,
)
from tests.codec_images import NUM_TOKENS, pixels, tiny_tokenizer
from utils.errors import UserError
from utils.evaluation.metrics import psnr, to_uint8

SIZES, ERRORS = np.array([10, 11, 13, 16]), np.array([0.4, 0.2, 0.3, 0.1])


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def options(sizes=SIZES, errors=ERRORS, scores=None):
    return Options(np.arange(1, len(sizes) + 1)[:, None], np.asarray(sizes), np.asarray(errors), scores)


def random_options(count, seed=0, most=8):
    """Sizes and errors of some images, whose errors fall with the size for the most part."""
    draws = np.random.default_rng(seed)
    sizes = [np.sort(draws.integers(8, 40, draws.integers(1, most + 1))) for _ in range(count)]
    errors = [draws.random() / size * draws.uniform(0.8, 1.2, len(size)) for size in sizes]
    return sizes, errors


def test_errors_of_prefixes_are_those_of_decoding_them(tokenizer):
    images = pixels(3)
    encoded = encode(tokenizer, images)
    with torch.no_grad():
        _, result = tokenizer.encode(images / 255)
        decoded = to_uint8(tokenizer.decode_tokens(encoded.tokens, 2)) / 255
    assert torch.equal(encoded.tokens, result["min_encoding_indices"][:, 0])
    errors, scores = curves(tokenizer, encoded, [2, 5])
    assert errors.shape == (3, 2) and scores is None
    np.testing.assert_allclose(psnr_of(errors[:, 0]), psnr(decoded, images / 255), rtol=1e-4)


def test_a_measure_is_taken_of_every_prefix(tokenizer):
    encoded = encode(tokenizer, pixels(2))
    _, scores = curves(tokenizer, encoded, [1, 3, 6], score=lambda images, originals: images.mean(dim=(1, 2, 3)))
    assert scores.shape == (2, 3)


def test_pixels_without_weight_do_not_count():
    one, other = pixels(1), pixels(1)
    other[:, :, :8] = 255 - other[:, :, :8]
    weights = torch.ones(1, 1, 16, 16)
    assert squared_error(one, other, weights) > 0.1
    weights[:, :, :8] = 0
    assert squared_error(one, other, weights) == 0


def test_short_sequences_are_tried_at_every_length_and_long_ones_by_eighths_of_a_doubling(tokenizer):
    assert tried_lengths(tokenizer) == [1, 2, 3, 4, 5, 6]
    assert tried_lengths(tokenizer, 4) == [1, 2, 3, 4]
    assert tried_lengths(tokenizer, 99) == [1, 2, 3, 4, 5, 6]
    lengths = tried_lengths(tiny_tokenizer(num_latent_tokens=256))
    assert lengths[:34] == [*range(1, 33), 35, 38] and lengths[-2:] == [235, 256]
    assert len(lengths) == 32 + 3 * 8
    assert tried_lengths(tiny_tokenizer(num_latent_tokens=256), 100)[-2:] == [99, 100]
    with pytest.raises(UserError, match="1 to 6 tokens, got 0"):
        tried_lengths(tokenizer, 0)


def test_a_tokenizer_without_prefixes_keeps_all_its_tokens():
    strict = tiny_tokenizer(strict_length_assertion=True)
    assert tried_lengths(strict) == [NUM_TOKENS]
    with pytest.raises(UserError, match="needs all of its 6 tokens, got a limit of 3"):
        tried_lengths(strict, 3)


def test_the_best_prefix_within_a_limit_is_not_always_the_longest():
    assert best_within(SIZES, ERRORS, 14) == 1
    assert best_within(SIZES, ERRORS, 99) == 3
    assert best_within(SIZES, ERRORS, 9) is None
    assert best_within(np.array([5, 4, 6]), np.array([0.2, 0.2, 0.3]), 9) == 1  # of equals the smaller


def test_the_smallest_option_that_reaches_a_quality_is_taken():
    scores = psnr_of(ERRORS)
    assert smallest_reaching(SIZES, ERRORS, scores, 6.0) == 1
    assert smallest_reaching(SIZES, ERRORS, scores, 20.0) is None


@pytest.mark.parametrize(
    "goal, option, is_reached",
    [
        (Goal("tokens", 4), 3, True),
        (Goal("max_bytes", 13), 1, True),
        (Goal("psnr", 6.0), 1, True),
        (Goal("psnr", 30.0), 3, False),
    ],
)
def test_a_goal_means_an_option(goal, option, is_reached):
    choice = choose(options(), goal)
    assert (choice.option, choice.is_reached) == (option, is_reached)


def test_other_measures_are_higher_where_they_are_better_and_a_distance_is_turned():
    scores = np.array([0.1, 0.5, 0.7, 0.6])
    assert choose(options(scores=scores), Goal("ssim", 0.55)).option == 2
    assert choose(options(scores=-scores), Goal("perceptual", 0.3)).option == 0
    assert not choose(options(scores=-scores), Goal("perceptual", 0.05)).is_reached


def test_options_are_looked_at_where_their_errors_are_only_bounds():
    sizes, psnr = np.arange(300, 100, -1), np.linspace(25.0, 15.0, 200)
    better = 0.4 + 0.3 * np.cos(np.arange(200) / 40)  # dB that an option has more than known
    few = options(sizes, 10 ** (-psnr / 10))
    looked = []

    def look(option):
        looked.append(option)
        return 10 ** (-(psnr[option] + better[option]) / 10)

    for target in (3.0, 16.0, 20.0, 25.2):
        looked.clear()
        choice = smallest_seen(few, target, look)
        assert choice.option == np.flatnonzero(psnr + better >= target).max() and choice.is_reached
        assert choice.error == look(choice.option) and len(looked) <= 7
    looked.clear()
    choice = smallest_seen(few, 30.0, look)
    assert (choice.option, choice.is_reached, looked) == (0, False, [0])


def test_too_few_bytes_for_one_image_are_an_error_that_says_how_many_it_takes():
    with pytest.raises(UserError, match="takes 10 bytes at least, and 9 are allowed"):
        choose(options(), Goal("max_bytes", 9))


def test_one_goal_can_be_asked_for():
    assert goal_of(tokens=None, psnr=20.0) == Goal("psnr", 20.0)
    assert goal_of(tokens=None, psnr=None) == Goal("tokens", None)
    with pytest.raises(UserError, match="--tokens and --psnr were given: ask for one of --tokens, --psnr, --ssim;"):
        goal_of(tokens=4, psnr=20.0, ssim=None)
    for wrong in ({"tokens": 0}, {"max_bytes": -1}, {"psnr": float("nan")}, {"psnr": float("inf")}, {"budget": 0}):
        with pytest.raises(UserError, match="must be"):
            goal_of(**wrong)
    for wrong in ("x", b"4", [3], True):
        with pytest.raises(UserError, match="tokens must be a number, 1 or more, got "):
            goal_of(tokens=wrong)
    with pytest.raises(UserError, match="--tokens must be a whole number, got 3.5"):
        goal_of(tokens=3.5)
    assert goal_of(tokens=np.int64(3)).value == 3
    assert goal_of(tokens=10**400).value == 10**400
    with pytest.raises(UserError, match="--tokens must be 1 or more, got -1000"):
        goal_of(tokens=-(10**400))
    with pytest.raises(UserError, match="one of tokens, max_bytes, budget, psnr, ssim, perceptual, got bytes"):
        goal_of(bytes=3)


def test_the_hull_skips_options_that_are_above_a_line_between_others():
    sizes, errors = np.array([4, 1, 2, 3, 6]), np.array([0.1, 0.9, 0.8, 0.2, 0.15])
    assert lower_hull(sizes, errors) == [1, 3, 0]


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_is_met_and_no_change_of_one_image_would_use_it_better(seed):
    sizes, errors = random_options(12, seed)
    least = sum(int(size.min()) for size in sizes)
    for budget in (least, least + 7, least + 60, 10_000):
        chosen = spread(sizes, errors, budget)
        spent = sum(int(size[at]) for size, at in zip(sizes, chosen, strict=True))
        assert spent <= budget
        for size, error, at in zip(sizes, errors, chosen, strict=True):
            fits = size - size[at] <= budget - spent
            assert (error[fits] >= error[at]).all()


def test_a_budget_may_be_any_number():
    sizes, errors = random_options(3)
    np.testing.assert_array_equal(spread(sizes, errors, 10**20), [error.argmin() for error in errors])


def test_a_budget_comes_near_to_the_best_of_all_choices():
    sizes, errors = random_options(5, seed=3, most=5)
    for budget in range(sum(int(size.min()) for size in sizes), sum(int(size.max()) for size in sizes), 3):
        totals = [
            sum(error[at] for error, at in zip(errors, places, strict=True))
            for places in itertools.product(*(range(len(size)) for size in sizes))
            if sum(size[at] for size, at in zip(sizes, places, strict=True)) <= budget
        ]
        ours = sum(error[at] for error, at in zip(errors, spread(sizes, errors, budget), strict=True))
        assert ours <= 1.15 * min(totals)


def test_a_budget_that_is_too_small_says_what_is_needed():
    with pytest.raises(UserError, match="budget of 19 bytes is too small: 2 images take 20 at least"):
        spread([SIZES, SIZES], [ERRORS, ERRORS], 19)


def test_tiles_take_what_they_need_where_that_pays_for_saying_so():
    lengths = np.arange(1, 9)
    bits = np.cumsum(np.full((1, 6, 8), 10.0), axis=2)
    errors = np.exp(-np.outer([0.0, 0, 0, 1, 1, 2], lengths / 4)) / 6  # the first three gain nothing by more
    kept, totals = tile_lengths(errors, bits, lengths)
    width = np.array([int(span).bit_length() for span in kept.max(axis=1) - kept.min(axis=1)])
    sizes = -(-6 * width // 8) + 10 * kept.sum(axis=1) // 8 + 1
    assert (np.diff(sizes) > 0).all() and (np.diff(totals) < 0).all()
    np.testing.assert_allclose(totals, [errors[range(6), way - 1].sum() for way in kept])
    middle = kept[len(kept) // 2]
    assert middle[5] > middle[0]


@pytest.fixture(scope="module")
def predictor(tokenizer):
    return length.fit(tokenizer, pixels(300, seed=1).split(100))


def test_guessed_lengths_reach_the_target_wherever_some_length_does(tokenizer, predictor):
    encoded = encode(tokenizer, pixels(40, seed=2))
    errors, _ = curves(tokenizer, encoded, range(1, 7))
    target = float(np.median(psnr_of(errors)))
    lengths, reached, num_decoded = length.lengths_reaching(tokenizer, encoded, predictor, target)
    np.testing.assert_allclose(reached, errors[range(40), lengths - 1], rtol=1e-4)
    # An image whose guess was too long may have passed over the one length that reaches the target.
    missed = psnr_of(reached) < target
    assert (lengths[missed] == NUM_TOKENS).all()
    assert 40 <= num_decoded <= 40 * NUM_TOKENS


def test_a_guess_steps_up_until_it_reaches_and_down_where_that_saves_much():
    lengths, psnr = np.arange(1, 9), np.linspace(10.0, 24.0, 8)[None]
    looked = []

    def look(rows, places):
        looked.append(int(places[0]) + 1)
        return 10 ** (-psnr[rows, places] / 10)

    for off, target, path in (
        (0, 16, [4]),
        (-6, 16, [7, 5]),
        (5, 16, [2, 4]),
        (-4, 16, [6]),
        (-2, 22, [8]),
        (0, 30, [8]),
    ):
        looked.clear()
        places, errors, num_decoded = length.places_reaching(psnr + off, lengths, target, look)
        assert looked == path and num_decoded == len(path)
        assert psnr_of(errors)[0] == pytest.approx(psnr[0, places[0]])
        assert lengths[places[0]] == path[-1]


def test_a_predictor_comes_back_from_its_file_for_its_own_tokenizer_alone(tokenizer, predictor, tmp_path):
    identity = bytes(range(32))
    predictor.save(tmp_path / "length.safetensors", identity)
    loaded = length.load_length_predictor(tmp_path / "length.safetensors", identity)
    encoded = encode(tokenizer, pixels(4))
    known = length.features(tokenizer, encoded)
    np.testing.assert_array_equal(predictor.expected(known, [1, 6]), loaded.expected(known, [1, 6]))
    with pytest.raises(UserError, match="belongs to the tokenizer 000102030405.*fit it again"):
        length.load_length_predictor(tmp_path / "length.safetensors", bytes(32))
    with pytest.raises(UserError, match="is not there: scripts/fit_entropy_model.py makes it"):
        length.load_length_predictor(tmp_path / "other.safetensors", identity)
    (tmp_path / "broken.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match="damaged or no length predictor"):
        length.load_length_predictor(tmp_path / "broken.safetensors", identity)
    for odd in ({"weights": predictor.weights * np.nan}, {"deviations": predictor.deviations[:-1]}):
        dataclasses.replace(predictor, **odd).save(tmp_path / "odd.safetensors", identity)
        with pytest.raises(UserError, match=f"damaged or no length predictor.*{next(iter(odd))}"):
            length.load_length_predictor(tmp_path / "odd.safetensors", identity)


def test_a_predictor_is_not_fitted_to_a_handful_of_images(tokenizer):
    with pytest.raises(UserError, match="hundreds of images, got 4"):
        length.fit(tokenizer, [pixels(4)])
    with pytest.raises(UserError, match="hundreds of images, got 0"):
        length.fit(tokenizer, [])


def test_a_predictor_is_fitted_beside_an_image_that_comes_back_exactly(tokenizer, monkeypatch):
    errors, _ = curves(tokenizer, encode(tokenizer, pixels(20)), range(1, NUM_TOKENS + 1))
    errors[0, 0] = 0.0
    monkeypatch.setattr(length, "curves", lambda tokenizer, encoded, lengths: (errors, None))
    assert np.isfinite(length.fit(tokenizer, [pixels(20)]).weights).all()
