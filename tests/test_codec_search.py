"""Searched tokens: nearer to the image at every prefix that counts, and what they cost counts too."""

import dataclasses

import numpy as np
import pytest
import torch

from codec.rate import curves, encode, psnr_of, squared_error
from codec.search import EFFORTS, Effort, Trial, effort_of, search, searched_lengths
from tests.codec_images import CODEBOOK, NUM_TOKENS, pixels, tiny_tokenizer
from utils.errors import UserError

LENGTHS = [1, 2, 4, 6]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return encode(tokenizer, pixels(4))


def decibels(tokenizer, encoded, tokens, lengths=LENGTHS, weights=None):
    """PSNR (B, L) of prefixes of tokens."""
    return psnr_of(curves(tokenizer, dataclasses.replace(encoded, tokens=tokens), lengths, weights)[0])


def test_searched_tokens_are_nearer_in_the_mean_of_the_prefixes(tokenizer, encoded):
    before = decibels(tokenizer, encoded, encoded.tokens).mean(axis=1)
    gains = []
    for effort in EFFORTS[1:]:
        after = decibels(tokenizer, encoded, search(tokenizer, encoded, LENGTHS, effort)).mean(axis=1)
        assert (after >= before - 1e-6).all()
        gains.append((after - before).mean())
    assert 0 < gains[0] < gains[-1]


def test_no_effort_changes_nothing(tokenizer, encoded):
    assert torch.equal(search(tokenizer, encoded, LENGTHS, EFFORTS[0]), encoded.tokens)


def test_tokens_after_the_longest_prefix_stay(tokenizer, encoded):
    tokens = search(tokenizer, encoded, [1, 2], EFFORTS[3])
    assert torch.equal(tokens[:, 2:], encoded.tokens[:, 2:])
    assert not torch.equal(tokens[:, :2], encoded.tokens[:, :2])


def test_where_every_code_is_tried_the_best_is_found(tokenizer, encoded):
    tokens = search(tokenizer, encoded, [1], Effort(((CODEBOOK - 1,),), 1))
    each = torch.arange(CODEBOOK).expand(4, CODEBOOK)
    found = np.stack([decibels(tokenizer, encoded, code[:, None], [1])[:, 0] for code in each.T], axis=1)
    np.testing.assert_allclose(decibels(tokenizer, encoded, tokens, [1])[:, 0], found.max(axis=1), rtol=1e-5)


def test_a_codebook_of_fewer_codes_than_are_tried_is_searched_too():
    small = tiny_tokenizer(codebook_size=4)
    encoded = encode(small, pixels(2))
    after = decibels(small, encoded, search(small, encoded, LENGTHS, EFFORTS[3])).mean(axis=1)
    assert (after >= decibels(small, encoded, encoded.tokens).mean(axis=1) - 1e-6).all()


def test_images_are_searched_alone_as_in_a_batch(tokenizer, encoded):
    together = search(tokenizer, encoded, LENGTHS, EFFORTS[2])
    for row in range(4):
        alone = encode(tokenizer, encoded.pixels[row : row + 1])
        assert torch.equal(search(tokenizer, alone, LENGTHS, EFFORTS[2])[0], together[row])


def test_bits_count(tokenizer, encoded):
    def bits(tokens):
        return torch.arange(CODEBOOK).float().expand(len(tokens), -1)  # the first codes are the cheapest

    def mean_bits(tokens):
        return tokens.float().mean()

    free = search(tokenizer, encoded, LENGTHS, EFFORTS[3])
    counted = search(tokenizer, encoded, LENGTHS, EFFORTS[3], bits=bits)
    assert mean_bits(counted) < mean_bits(free)


def test_pixels_without_weight_do_not_guide_the_search(tokenizer, encoded):
    weights = torch.zeros(4, 1, 16, 16)
    weights[:, :, :4] = 1
    tokens = search(tokenizer, encoded, LENGTHS, EFFORTS[3], weights)
    plain = search(tokenizer, encoded, LENGTHS, EFFORTS[3])
    there = [decibels(tokenizer, encoded, some, weights=weights).mean() for some in (tokens, plain)]
    assert there[0] > there[1]


def test_a_sweep_tries_as_many_codes_as_the_effort_says_of_each_octave():
    assert [*Effort(((3, 2, 1), (4, 0)), 1).steps(5)] == [(0, 3), (1, 2), (2, 1), (3, 1), (4, 1), (0, 4)]
    assert not [*EFFORTS[0].steps(32)]


def test_prefixes_that_are_searched_double(tokenizer):
    assert searched_lengths(1) == [1]
    assert searched_lengths(6) == [1, 2, 4, 6]
    assert searched_lengths(32) == [1, 2, 4, 8, 16, 32]


def test_a_tokenizer_without_prefixes_is_searched_at_full_length():
    strict = tiny_tokenizer(strict_length_assertion=True)
    encoded = encode(strict, pixels(2))
    tokens = search(strict, encoded, [NUM_TOKENS], EFFORTS[2])
    before, after = (decibels(strict, encoded, some, [NUM_TOKENS]) for some in (encoded.tokens, tokens))
    assert (after >= before).all() and (after > before).any()


def test_slopes_are_those_of_the_decoded_error(tokenizer, encoded):
    with torch.no_grad():
        codes = tokenizer.quantize.lookup(encoded.tokens[:, :4]).clone()
        step = 1e-2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
        trial = Trial(tokenizer, encoded.pixels, None)
        slopes = trial.slopes(codes, 1, codes[:, 1])

    def errors(vectors):
        moved = codes.clone()
        moved[:, 1] = vectors
        with torch.no_grad():
            images = 255 * tokenizer.decode(moved.movedim(-1, 1)[:, :, None])
        return 10 * squared_error(images, encoded.pixels).log10()

    change = (errors(codes[:, 1] + step) - errors(codes[:, 1] - step)) / 2
    torch.testing.assert_close((slopes * step).sum(dim=1).double(), change, rtol=0.05, atol=1e-3)


def test_there_are_four_efforts():
    assert effort_of(3) is EFFORTS[3]
    with pytest.raises(UserError, match="0 to 3, got 4"):
        effort_of(4)
