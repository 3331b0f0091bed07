"""From images to files and back: goals, fits, tiles, cut and foreign files, in batches as alone."""

import dataclasses
import random
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from codec.bitstream import Fit, FormatError, Geometry, Header, Mode, Tiles, pack, unpack
from codec.canvas import UNKNOWN_GREY, padded_box, to_canvas
from codec.entropy import FILE
from codec.files import (
    Codec,
    Settings,
    codec_for,
    codec_named,
    compress,
    decompress,
    header_bytes,
    load_codec,
)
from codec.image_format import as_format
from codec.length import FILE as LENGTH_FILE
from codec.length import fit
from codec.rate import Choice, Goal
from tests.apple_gpu import AppleGPU
from tests.codec_images import CODEBOOK, NUM_TOKENS, SIDE, photo, pixels, save_codec, tiny_tokenizer
from utils.errors import UserError
from utils.evaluation.image_formats import candidates
from utils.evaluation.metrics import psnr, ssim, to_uint8
from utils.paths import ROOT

FITS = pytest.mark.parametrize("fit", list(Fit), ids=[fit.name.lower() for fit in Fit])


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return load_codec(checkpoint=str(save_codec(tmp_path_factory.mktemp("one") / "model")))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return load_codec(checkpoint=str(save_codec(tmp_path_factory.mktemp("other") / "model", seed=1)))


@pytest.fixture(scope="module")
def images():
    return [photo(SIDE, SIDE, seed) for seed in range(5)]


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


def decoded(codec, image, num_tokens):
    """What the tokenizer alone makes of an image and so many tokens."""
    with torch.no_grad():
        _, result = codec.tokenizer.encode(as_tensor(image))
        return to_uint8(codec.tokenizer.decode_tokens(result["min_encoding_indices"], num_tokens))


def test_a_file_decodes_to_the_tokens_of_its_image(codec, images):
    for written, image in zip(codec.compress(images, Settings()), images, strict=True):
        assert written.data[:2] == b"\x1d" + bytes([0x50 | unpack(written.data).header.mode])
        back = codec.decompress([written.data])[0]
        expected = decoded(codec, image, written.num_tokens)
        assert np.array_equal(np.asarray(back), expected[0].permute(1, 2, 0))
        np.testing.assert_allclose(written.psnr, psnr(expected / 255, as_tensor(image))[0], rtol=1e-4)


@FITS
def test_files_are_the_smallest_of_all_modes_and_of_the_size_that_was_counted(codec, images, fit):
    settings, given = Settings(fit=fit), [*images, photo(41, 27)]
    for draft in codec.drafts([codec.canvas(image, settings) for image in given], settings):
        for option, size in enumerate(draft.options.sizes):
            assert len(codec.write(draft, Choice(option), settings).data) == size


@pytest.mark.parametrize("goal", [Goal("tokens", 3), Goal("max_bytes", 11), Goal("psnr", 11.0), Goal("ssim", 0.2)])
def test_goals_are_kept(codec, images, goal):
    for written, image in zip(codec.compress(images, Settings(goal)), images, strict=True):
        back = as_tensor(codec.decompress([written.data])[0])
        if goal.measure == "tokens":
            assert written.num_tokens <= goal.value
        elif goal.measure == "max_bytes":
            assert len(written.data) <= goal.value
        elif goal.measure == "psnr" and written.is_reached:
            assert psnr(back, as_tensor(image)) >= goal.value - 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        Settings(effort=1),
        Settings(fit=Fit.PAD, effort=1),
        Settings(Goal("psnr", 11.0)),
    ],
)
def test_files_are_written_and_read_without_float64_on_the_device(codec, images, settings):
    expected = codec.compress(images[:2], settings)
    with AppleGPU():
        written = codec.compress(images[:2], settings)
        codec.decompress([file.data for file in written])
    assert [file.data for file in written] == [file.data for file in expected]


@pytest.mark.parametrize("measure", ["ssim", "perceptual"])
def test_padded_images_are_scored_without_their_margins(codec, measure):
    settings, images = Settings(Goal(measure, 0.5), Fit.PAD), [photo(40, 30), photo(SIDE, SIDE), photo(30, 40)]
    canvases = [codec.canvas(image, settings) for image in images]
    for draft, canvas, image in zip(codec.drafts(canvases, settings), canvases, images, strict=True):
        left, top, right, bottom = padded_box(*image.size, SIDE)
        shown, original = (
            square[:, :, top:bottom, left:right]
            for square in (decoded(codec, Image.fromarray(canvas.squares[0]), 3) / 255, as_tensor(canvas.squares[0]))
        )
        score = ssim(shown, original) if measure == "ssim" else -codec.distance.per_image(shown, original)
        np.testing.assert_allclose(draft.options.scores[2], score.item(), rtol=1e-4)


def test_an_image_that_is_too_small_for_ssim_is_refused(codec):
    settings = Settings(Goal("ssim", 0.5), Fit.PAD)
    with pytest.raises(UserError, match="ssim needs 11 pixels a side, and this image has 16 x 8 at the model's scale"):
        codec.compress([photo(40, 20)], settings)


def test_a_budget_holds_for_all_files_together(codec, images):
    least = sum(len(one.data) for one in codec.compress(images, Settings(Goal("tokens", 1))))
    for budget in (least, least + 5, 1000):
        written = codec.compress(images, Settings(Goal("budget", budget)))
        assert sum(len(one.data) for one in written) <= budget
    with pytest.raises(UserError, match=f"5 images take {least} at least"):
        codec.compress(images, Settings(Goal("budget", least - 1)))


def test_a_batch_gives_the_files_of_each_alone(codec, images):
    together = codec.compress(images, Settings(effort=1))
    alone = [codec.compress([image], Settings(effort=1))[0] for image in images]
    assert [one.data for one in together] == [one.data for one in alone]
    singles = [np.asarray(codec.decompress([one.data])[0]).astype(int) for one in together]
    for one, image in zip(singles, codec.decompress([one.data for one in together]), strict=True):
        assert np.abs(one - np.asarray(image)).max() <= 1  # pixels are computed in floats


def test_effort_brings_the_image_nearer(codec, images):
    plain, searched = (np.mean([one.psnr for one in codec.compress(images, Settings(effort=n))]) for n in (0, 3))
    assert searched > plain


@pytest.mark.parametrize("fit", [Fit.CROP, Fit.TILE])
@pytest.mark.parametrize("goal", [Goal("tokens", 3), Goal("max_bytes", 120), Goal("psnr", 10.0)])
def test_no_effort_is_worse_than_none_for_what_is_asked(codec, images, goal, fit):
    given = [*images, photo(41, 27)]
    plain, searched = (codec.compress(given, Settings(goal, fit, effort)) for effort in (0, 1))
    for before, after in zip(plain, searched, strict=True):
        if goal.measure == "psnr" and before.is_reached:
            assert after.is_reached and len(after.data) <= len(before.data)
        else:
            assert after.psnr >= before.psnr


def test_tokens_of_the_encoder_stay_where_a_search_loses_at_the_length_that_is_wanted():
    codec, image = codec_named("one-d-piece_fashion"), Image.open(ROOT / "assets/fashion/shirt.png").convert("RGB")
    plain, searched = (codec.compress([image], Settings(Goal("max_bytes", 14), effort=effort))[0] for effort in (0, 3))
    assert len(searched.data) <= 14 and searched.psnr >= plain.psnr


@FITS
def test_any_image_comes_back_in_its_size(codec, fit):
    image = photo(41, 27)
    written = codec.compress([image], Settings(fit=fit))[0]
    header = unpack(written.data).header
    assert (header.geometry.width, header.geometry.height, header.geometry.fit) == (41, 27, fit)
    assert codec.decompress([written.data])[0].size == ((27, 27) if fit == Fit.CROP else (41, 27))


def test_tiles_have_lengths_of_their_own_and_keep_to_a_size(codec):
    image = Image.new("RGB", (80, 60), (120, 130, 140))
    image.paste(photo(40, 60), (40, 0))  # the left half is flat
    best = codec.compress([image], Settings(fit=Fit.TILE))[0]
    smallest = codec.compress([image], Settings(Goal("tokens", 1), Fit.TILE))[0]
    limit = (len(best.data) + len(smallest.data)) // 2
    written = codec.compress([image], Settings(Goal("max_bytes", limit), Fit.TILE))[0]
    assert limit - 8 <= len(written.data) <= limit
    assert len(set(unpack(written.data).header.lengths)) > 1
    back = np.asarray(codec.decompress([written.data])[0]).astype(float)
    error = np.square(back - np.asarray(image)).mean() / 255**2
    assert -10 * np.log10(error) >= written.psnr - 1e-3


def test_the_least_bytes_of_tiles_can_be_asked_for_and_fewer_are_refused_with_their_number(codec):
    image = photo(80, 60)
    least = len(codec.compress([image], Settings(Goal("tokens", 1), Fit.TILE))[0].data)
    assert len(codec.compress([image], Settings(Goal("max_bytes", least), Fit.TILE))[0].data) == least
    for goal in (Goal("max_bytes", least - 1), Goal("budget", least - 1)):
        with pytest.raises(UserError, match=f"take[s]? {least} (bytes )?at least"):
            codec.compress([image], Settings(goal, Fit.TILE))


def test_tiles_of_few_of_many_tokens_are_written():
    """All 32 tokens of a tile would be more bytes than a file may hold for one."""
    codec = load_codec(checkpoint="one-d-piece_emoji")
    written = codec.compress([photo(90, 70)], Settings(Goal("tokens", 1), Fit.TILE))[0]
    assert set(unpack(written.data).header.lengths) == {1}


def psnr_of_file(codec, written, image):
    return float(psnr(as_tensor(codec.decompress([written.data])[0]), as_tensor(image))[0])


@pytest.mark.parametrize("goal", [Goal("tokens", 2), Goal("max_bytes", 40), Goal("budget", 40), Goal("psnr", 99.0)])
def test_the_psnr_that_is_said_of_tiles_is_that_of_the_whole_image(codec, goal):
    image = photo(50, 40)
    (written,) = codec.compress([image], Settings(goal, Fit.TILE))
    assert written.psnr == pytest.approx(psnr_of_file(codec, written, image), abs=1e-3)
    assert written.is_reached == (goal.measure != "psnr")


def test_the_smallest_tiles_that_have_a_psnr_together_are_written():
    codec, settings = codec_named("one-d-piece_fashion"), Settings(fit=Fit.TILE)
    image = Image.open(ROOT / "assets/photos/chelsea.png").convert("RGB").resize((60, 40))
    (draft,) = codec.drafts([codec.canvas(image, settings)], settings)
    sizes = draft.options.sizes
    files = [codec.write(draft, Choice(option), settings) for option in range(len(sizes))]
    found = np.array([psnr_of_file(codec, file, image) for file in files])
    assert (found > [file.psnr + 0.1 for file in files]).all()  # where tiles overlap their errors even out
    for target in np.arange(found.min() - 0.3, found.max(), 0.2):
        (choice,) = codec.chosen([draft], Goal("psnr", target))
        assert choice.is_reached and found[choice.option] >= target
        assert sizes[choice.option] <= sizes[found >= target + 0.05].min(initial=sizes.max())


def test_fewer_tokens_than_a_file_has_can_be_read(codec, images):
    (file,) = [one.data for one in codec.compress(images[:1], Settings())]
    back = codec.decompress([file], num_tokens=2)[0]
    assert np.array_equal(np.asarray(back), decoded(codec, images[0], 2)[0].permute(1, 2, 0))
    assert codec.decompress([file], num_tokens=99)[0].size == (SIDE, SIDE)


@FITS
def test_a_file_cut_anywhere_shows_what_is_left_of_it(codec, fit):
    whole = codec.compress([photo(41, 27)], Settings(fit=fit))[0].data
    header_size = unpack(whole).header_size
    shown = []
    for size in range(len(whole)):
        try:
            image = codec.decompress([whole[:size]])[0]
        except FormatError as error:
            assert not shown, f"{size} bytes give no image, and fewer did: {error}"
            continue
        shown.append(size)
        assert image.size == codec.decompress([whole])[0].size
    assert shown and shown[0] <= header_size + 3


def test_a_cut_file_gives_the_first_tokens_of_the_whole(codec, images):
    whole = codec.compress(images[:1], Settings())[0].data
    tokens = codec.read(whole).tokens[0]
    for size in range(unpack(whole).header_size + 3, len(whole)):
        read = codec.read(whole[:size])
        certain = int(read.certain[0])
        assert read.is_cut and certain < len(tokens)
        assert np.array_equal(read.tokens[0, :certain], tokens[:certain])


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.long)])
def test_flipped_bits_end_in_an_error_or_an_image(codec, count):
    draws = random.Random(0)
    files = [codec.compress([photo(41, 27)], Settings(fit=fit))[0].data for fit in (Fit.PAD, Fit.TILE)]
    images = 0
    for _ in range(count):
        broken = bytearray(draws.choice(files))
        for _ in range(draws.choice((1, 1, 2, 8))):
            broken[draws.randrange(len(broken))] ^= 1 << draws.randrange(8)
        if bytes(broken) in files:
            continue
        try:
            codec.read(bytes(broken))
            images += 1
        except FormatError as error:
            assert str(error)
    assert images <= max(2, count // 100)  # the check of 8 bits lets few of them through


def test_a_file_of_another_model_names_both(codec, other, images):
    file = compress(images[0], other)
    with pytest.raises(FormatError) as raised:
        codec.decompress([file])
    for name in (codec.name, codec.identity[:2].hex(), other.identity[:2].hex()):
        assert name in str(raised.value)
    with pytest.raises(FormatError, match=f"unknown tokenizer .{other.identity[:2].hex()}.: give it as --checkpoint"):
        decompress(file)


def test_bundled_models_read_their_files_unasked():
    images = [Image.open("assets/fashion/bag.png"), Image.open("assets/emoji/pizza.png")]
    files = [compress(images[0], tokens=2), compress(images[1], "one-d-piece_emoji", tokens=2)]
    assert [codec_for(file).name for file in files] == ["one-d-piece_fashion", "one-d-piece_emoji"]
    assert [image.size for image in decompress(files)] == [(32, 32), images[1].size]


def test_declared_sizes_that_a_file_cannot_hold_are_refused_before_any_work(codec):
    file = codec.compress([photo(41, 27)], Settings(fit=Fit.TILE))[0].data
    whole = unpack(file)
    tiles = dataclasses.replace(whole.header.geometry.tiles, columns=200, rows=300, lengths=(NUM_TOKENS,) * 60_000)
    geometry = dataclasses.replace(whole.header.geometry, width=3000, height=4000, tiles=tiles)
    size = whole.header.payload_size
    header = dataclasses.replace(whole.header, num_tokens=NUM_TOKENS, geometry=geometry, mode=Mode.FIXED, entropy=b"\0")
    with pytest.raises(FormatError):
        codec.decompress([pack(header, whole.payload[:size])])


def test_a_few_bytes_of_a_large_image_take_no_more_memory_than_it(codec):
    """A header of 30,745 tiles, cut behind the first tokens: grey but for one tile."""
    tiles = Tiles(215, 143, (NUM_TOKENS,) * (215 * 143))
    header = Header(
        Mode.FIXED, codec.identity[:2], b"\0", NUM_TOKENS, 60_000, Geometry(3000, 2000, Fit.TILE, tiles=tiles)
    )
    file = pack(header, bytes(60_000))[: header_bytes(NUM_TOKENS, 60_000, header.geometry) + 1]
    assert len(file) < 30
    tracemalloc.start()
    image = np.asarray(codec.decompress([file])[0])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image.shape == (2000, 3000, 3) and (image[20:] == UNKNOWN_GREY).all()
    assert not (image[:10, :10] == UNKNOWN_GREY).all()
    assert most < 3 * image.nbytes


def test_headers_are_eight_bytes_for_an_image_of_the_models_size(codec, images):
    file = codec.compress(images[:1], Settings())[0].data
    assert unpack(file).header_size == 8 == header_bytes(NUM_TOKENS, 4, None)
    assert header_bytes(256, 384, None) == 10
    assert isinstance(unpack(file).header, Header)


@pytest.mark.parametrize("mode", list(Mode), ids=[mode.name.lower() for mode in Mode])
def test_bare_payloads_come_back_where_their_reader_knows_what_they_hold(codec, images, mode):
    settings = Settings(Goal("tokens", 4), mode=mode, is_bare=True)
    (written,) = codec.compress(images[:1], settings)
    whole = codec.compress(images[:1], dataclasses.replace(settings, is_bare=False))[0]
    assert len(written.data) == len(whole.data) - 8 and unpack(whole.data).header.mode == mode
    back = codec.decompress_bare(written.data, written.num_tokens, mode)
    assert np.array_equal(np.asarray(back), np.asarray(codec.decompress([whole.data])[0]))
    with pytest.raises(UserError, match="1 to 6 tokens, got 7"):
        codec.decompress_bare(written.data, 7, mode)


def test_a_tokenizer_without_entropy_models_takes_fixed_bits(images):
    codec = Codec(tiny_tokenizer(), "bare")
    assert codec.models.best().mode == Mode.FIXED
    file = compress(images[0], codec, effort=1)
    assert len(file) <= 8 + -(-NUM_TOKENS * (CODEBOOK.bit_length() - 1) // 8)
    assert decompress(file, codec).size == decompress(bytearray(file), codec).size == (SIDE, SIDE)
    with pytest.raises(UserError, match="no entropy model of the mode network"):
        codec.compress(images[:1], Settings(mode=Mode.NETWORK))


def test_a_length_is_guessed_for_a_psnr(tmp_path, images):
    folder = save_codec(tmp_path / "model")
    codec = load_codec(checkpoint=str(folder))
    with pytest.raises(UserError, match="length.safetensors is not there"):
        compress(images, codec, psnr=10.0, fast=True)
    fit(codec.tokenizer, pixels(200, seed=1).split(100)).save(folder / LENGTH_FILE, codec.identity)
    fast, plain = (compress(images, codec, psnr=10.0, fast=is_fast) for is_fast in (True, False))
    for file, other, image in zip(fast, plain, images, strict=True):
        assert psnr(as_tensor(decompress(file, codec)), as_tensor(image)) >= 10.0 - 1e-3 or file == other


@pytest.mark.parametrize("effort", [0, 1])
def test_a_psnr_that_no_guess_reaches_gives_the_same_file_as_without_guesses(effort):
    codec, names = codec_named("one-d-piece_fashion"), ("sandal", "bag", "shirt")
    images = [Image.open(ROOT / f"assets/fashion/{name}.png") for name in names]
    for target in (40.0, 19.407, 22.35):  # of the sandal and the shirt, which have more with 27 and 20 tokens than 32
        plain, fast = (
            codec.compress(images, Settings(Goal("psnr", target), effort=effort, is_fast=is_fast))
            for is_fast in (False, True)
        )
        for one, other in zip(plain, fast, strict=True):
            assert one.is_reached == other.is_reached and (one.is_reached or one.data == other.data)


def test_entropy_models_of_another_tokenizer_are_refused(tmp_path):
    folder, foreign = save_codec(tmp_path / "model"), save_codec(tmp_path / "foreign", seed=1)
    (folder / FILE).write_bytes((foreign / FILE).read_bytes())
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        load_codec(checkpoint=str(folder))


def test_as_an_image_format_it_gives_the_best_file_within_each_number_of_bytes(codec):
    image = photo(41, 41)
    budgets = [20, 40, 60, 200]
    for how in (Fit.CROP, Fit.TILE):
        form = as_format(codec, budgets, 41, fit=how)
        found = list(candidates(form, np.asarray(image), (1.0,), limit=1000))
        sizes = [file.num_bytes for file in found]
        assert sizes == sorted(set(sizes)) and all(file.pixels.shape == (41, 41, 3) for file in found)
        for budget in budgets:
            try:
                (written,) = codec.compress([image], Settings(Goal("max_bytes", budget), how))
            except UserError:
                assert min(sizes) > budget
                continue
            assert len(written.data) == max(size for size in sizes if size <= budget)
        header = unpack(codec.compress([image], Settings(fit=how))[0].data).header_size
        assert 0 <= header - form.header <= 4  # that of tiles of one length, and 9 lengths of 1..6 take 3 bits each


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"tokens": 3, "psnr": 20.0}, "--tokens and --psnr were given"),
        ({"fit": "squash"}, "fit must be one of crop, pad, stretch, tile, got squash"),
        ({"effort": 9}, "an effort is 0 to 3, got 9"),
        ({"fast": True}, "fast is for psnr"),
        ({"ssim": 0.5, "fit": "tile"}, "ssim cannot be asked for with the fit tile"),
        ({"max_bytes": 3}, "takes 9 bytes at least, and 3 are allowed|takes 10 bytes at least, and 3 are allowed"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_sentence(codec, images, asked, message):
    with pytest.raises(UserError, match=message):
        compress(images[0], codec, **asked)


def test_a_canvas_may_hold_squares_and_tiles_at_once(codec):
    settings = Settings(fit=Fit.TILE)
    drafts = codec.drafts([to_canvas(image, Fit.TILE, SIDE) for image in (photo(SIDE, SIDE), photo(20, 20))], settings)
    assert [draft.tokens.shape for draft in drafts] == [(1, 1, NUM_TOKENS), (1, 4, NUM_TOKENS)]
    assert drafts[0].geometry is None


@pytest.mark.parametrize("name", ["one-d-piece_fashion", "one-d-piece_emoji"])
def test_what_a_bundled_model_adds_for_files_takes_a_megabyte_and_is_its_own(name):
    codec = load_codec(checkpoint=name)
    assert sorted(codec.models.by_mode) == list(Mode)
    assert codec.predictor.lengths[-1] == 32  # of this tokenizer, or it would be refused
    assert sum((codec.folder / file).stat().st_size for file in (FILE, LENGTH_FILE)) <= 1_000_000
