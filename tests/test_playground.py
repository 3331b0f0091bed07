"""What the page with a slider does, as functions: compressing, cutting, generating, looking at tokens."""

import ast
import contextlib
import io
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from codec.bitstream import FormatError, unpack
from codec.files import FITS, Codec, Settings
from codec.rate import Goal
from modeling.generators import sample
from modeling.samplers.settings import SamplerSettings
from playground import drawing, uploads
from playground.compressing import MAX_TILES, bounded, cut, open_file, prepare
from playground.exploring import (
    alike,
    codebook_colours,
    decode,
    explore,
    explore_file,
    first_tokens,
    replacements,
    with_code,
)
from playground.generating import generate
from playground.models import PHOTOGRAPHS, TOKENIZERS, Models
from scripts import demo
from tests.codec_images import NUM_TOKENS, SIDE, photo, save_codec, tiny_tokenizer
from utils.errors import UserError
from utils.paths import ROOT

HOSTILE = '<img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Models(checkpoint=str(save_codec(tmp_path_factory.mktemp("tiny") / "tiny")))


@pytest.fixture(scope="module")
def codec(tiny) -> Codec:
    return tiny.codec(tiny.tokenizers[0])


@pytest.fixture(scope="module")
def bundled():
    return Models()


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# Compress


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch", "tile"])
def test_every_length_has_its_file_and_the_image_of_it(codec, fit):
    prepared = prepare(codec, photo(37, 25), "photo", fit)
    assert prepared.lengths[0] == 1 and prepared.lengths[-1] == NUM_TOKENS
    for length, data, frame in zip(prepared.lengths, prepared.files, prepared.frames, strict=True):
        assert set(unpack(data).header.lengths) == {length}
        image = codec.decompress([data])[0]
        assert frame.shape == prepared.original.shape
        if fit == "tile":
            assert image.size == (37, 25)
            np.testing.assert_array_equal(np.asarray(image), frame)
    shape = {"pad": (round(SIDE * 25 / 37), SIDE), "tile": (25, 37)}.get(fit, (SIDE, SIDE))
    assert prepared.original.shape == (*shape, 3)


def test_an_image_of_the_models_size_is_shown_as_its_file_decodes(codec):
    prepared = prepare(codec, photo(SIDE, SIDE), "photo")
    for data, frame in zip(prepared.files, prepared.frames, strict=True):
        np.testing.assert_array_equal(np.asarray(codec.decompress([data])[0]), frame)


def test_the_numbers_are_those_of_what_is_shown(codec):
    prepared = prepare(codec, photo(40, 40), "photo", "tile")
    frame, original = prepared.frames[2] / 255, prepared.original / 255
    assert prepared.psnr[2] == pytest.approx(-10 * np.log10(np.square(frame - original).mean()), abs=1e-4)
    shown = drawing.stage(prepared, int(prepared.lengths[2]))
    values = dict(re.findall(r'data-name="(\w+)"><dt>\w+</dt><dd>([^<]+)<', shown))
    size = len(prepared.files[2])
    assert values == {
        "tokens": str(prepared.lengths[2]),
        "file": str(size),
        "rate": f"{8 * size / 1600:.3f}",
        "PSNR": f"{prepared.psnr[2]:.2f}",
        "SSIM": f"{prepared.ssim[2]:.3f}",
    }


def test_a_curve_of_one_length_is_drawn():
    codec = Codec(tiny_tokenizer(strict_length_assertion=True), "strict")
    prepared = prepare(codec, photo(SIDE, SIDE), "photo")
    assert len(prepared.lengths) == 1 and "nan" not in drawing.curve(prepared, 0)


@pytest.mark.parametrize("fit", ["crop", "tile"])
def test_an_effort_gives_the_tokens_that_the_command_finds(codec, fit):
    image = photo(40, 30, seed=3)
    prepared = prepare(codec, image, "photo", fit, effort=1)
    assert (prepared.tokens != prepare(codec, image, "photo", fit).tokens).any()
    settings = Settings(fit=FITS[fit], effort=1)
    (draft,) = codec.drafts([codec.canvas(image, settings)], settings)
    np.testing.assert_array_equal(prepared.tokens, draft.tokens[0])


def test_an_effort_takes_fewer_tiles(codec):
    counts = [len(prepare(codec, photo(640, 480), "photo", "tile", effort).tokens) for effort in (0, 3)]
    assert counts[1] <= MAX_TILES[3] < counts[0] <= MAX_TILES[0]


def test_a_target_moves_the_slider(codec):
    prepared = prepare(codec, photo(SIDE, SIDE), "photo")
    length, is_reached = prepared.reaching("max_bytes", int(prepared.sizes.max()))
    assert is_reached and prepared.errors[prepared.place(length)] == prepared.errors.min()
    length, is_reached = prepared.reaching("psnr", float(prepared.psnr.max()) - 0.01)
    assert is_reached and prepared.psnr[prepared.place(length)] >= prepared.psnr.max() - 0.01
    assert prepared.reaching("max_bytes", 3) == (1, False)
    assert not prepared.reaching("psnr", 90)[1]
    with pytest.raises(UserError, match="a target needs a number"):
        prepared.reaching("psnr", None)


def test_the_slider_answers_from_what_is_decoded(bundled, monkeypatch):
    """In CPU time of one thread; tests/test_playground_page.py measures the browser's."""
    image = uploads.open_image((ROOT / "assets/photos/coffee.png").read_bytes())
    for fit in ("crop", "tile"):
        prepared = prepare(bundled.codec(TOKENIZERS[0]), image, "coffee", fit)
        monkeypatch.setattr(torch.nn.Module, "__call__", None)  # no network runs
        times = []
        for num_tokens in range(1, 33):
            start = time.process_time()
            drawing.stage(prepared, num_tokens)
            times.append(time.process_time() - start)
        monkeypatch.undo()
        print(f"\n{fit}: {1000 * np.median(times):.1f} ms a step of the slider, {1000 * max(times):.1f} at most")
        assert np.median(times) < 0.1


def test_a_large_photograph_is_scaled_down_to_the_tiles_that_a_visitor_waits_for(codec):
    image, note = bounded(photo(640, 480), SIDE)
    assert "scaled down from 640 x 480" in note and image.width / image.height == pytest.approx(4 / 3, rel=0.05)
    assert len(prepare(codec, photo(640, 480), "photo", "tile").tokens) <= MAX_TILES[0]
    assert bounded(photo(40, 30), SIDE)[1] == ""


# A compressed file


@pytest.mark.parametrize("fit", ["crop", "tile"])
def test_a_file_is_shown_however_it_is_cut(tiny, codec, fit):
    data = prepare(codec, photo(40, 30), "photo", fit).files[-1]
    opened = open_file(tiny, data, "photo")
    whole = cut(codec, opened, len(data))
    assert whole.known == whole.total == sum(unpack(data).header.lengths) and whole.size == (40, 30)
    known = []
    for num_bytes in range(1, len(data) + 1):
        shown = cut(codec, opened, num_bytes)
        known.append(shown.known)
        assert (shown.image is None) == (shown.known == 0)
        if shown.image is not None and num_bytes < len(data):
            assert shown.known == codec.read(data[:num_bytes]).certain.sum()
        assert f"of {len(data):,} bytes" in drawing.opened(opened, shown)
    assert known[0] == 0 and known == sorted(known)


@pytest.mark.parametrize(("model", "fit"), [(TOKENIZERS[0], "tile"), (TOKENIZERS[1], "crop")])
def test_what_a_cut_file_lacks_is_invented_on_demand_and_said_to_be(bundled, model, fit):
    codec = bundled.codec(model)
    opened = open_file(bundled, prepare(codec, photo(40, 30), "photo", fit).files[-1], "photo")
    num_bytes = opened.header_size + (len(opened.data) - opened.header_size) // 2
    plain, completed, again = (cut(codec, opened, num_bytes, how) for how in (None, *[bundled.completer] * 2))
    assert 0 < plain.known == completed.known < completed.total
    assert not np.array_equal(plain.image, completed.image) and np.array_equal(completed.image, again.image)
    assert "invented" not in drawing.opened(opened, plain)
    assert f"invented by {completed.inventor}: this is not what was" in drawing.opened(opened, completed)
    whole = cut(codec, opened, len(opened.data), bundled.completer)
    assert whole.inventor == "" and np.array_equal(whole.image, cut(codec, opened, len(opened.data)).image)
    assert cut(codec, opened, opened.header_size, bundled.completer).image is None
    small = open_file(bundled, prepare(codec, photo(40, 30), "photo", fit).files[1], "photo")  # whole, of two tokens
    assert cut(codec, small, len(small.data), bundled.completer).inventor == completed.inventor


def test_a_model_without_a_generator_completes_nothing_and_says_so(tiny, codec):
    opened = open_file(tiny, prepare(codec, photo(40, 30), "photo").files[-1], "photo")
    with pytest.raises(UserError, match="no bundled generator makes tokens of"):
        cut(codec, opened, len(opened.data) - 1, tiny.completer)


def test_of_a_file_that_came_cut_it_is_said(tiny, codec):
    data = prepare(codec, photo(40, 30), "photo").files[-1]
    for given, words in ((data, False), (data[:-2], True)):
        opened = open_file(tiny, given, "photo")
        text = drawing.opened(opened, cut(codec, opened, len(given)))
        assert (f"whole it had {len(data)} bytes" in text) == words


def test_a_turned_photograph_is_spoken_of_as_it_is_seen(codec):
    image = photo(320, 160)
    image.getexif()[0x112] = 6  # to be turned by a quarter
    assert prepare(codec, image, "photo").note.startswith("160 x 320 pixels")


def test_what_a_panorama_loses_is_said(codec):
    said = "40 x 20 pixels, of which the middle square is kept"
    for fit, width, is_said in (("crop", 40, True), ("crop", 39, False), ("pad", 40, False), ("tile", 40, False)):
        assert prepare(codec, photo(width, 20), "panorama", fit).note.startswith(said) == is_said


def test_a_photograph_is_noted_where_a_bundled_model_sees_it(codec, monkeypatch):
    monkeypatch.setattr(codec, "name", "one-d-piece_fashion")
    image = photo(40, 20)
    first, second = prepare(codec, image, "photo").note.split("; ")
    assert "grey garments, and this image is in colour: expect a poor image" in first and "40 x 20 pixels" in second
    assert "colour" not in prepare(codec, image.convert("L"), "photo").note


def test_the_square_of_a_huge_image_is_shown_small(tiny, codec):
    prepared = prepare(codec, Image.new("RGB", (4000, 30)), "strip", "stretch")
    shown = cut(codec, open_file(tiny, prepared.files[-1], "strip"), 10**6)
    assert shown.size == (4000, 30) and shown.image.shape == (4, 512, 3)


def test_files_of_others_and_damaged_ones_are_refused_in_words(tiny, bundled, codec):
    data = prepare(codec, photo(SIDE, SIDE), "photo").files[-1]
    with pytest.raises(FormatError, match=f"and this page has {', '.join(TOKENIZERS)}: start it with that one"):
        open_file(bundled, data, "photo")
    with pytest.raises(FormatError, match="damaged"):
        open_file(tiny, data[:-1] + bytes([data[-1] ^ 1]), "photo")
    with pytest.raises(FormatError, match="no .1dp file"):
        open_file(tiny, b"GIF89a and more", "photo")
    wide = codec.compress([photo(SIDE * 300, 8)], settings_of("tile"))[0].data
    with pytest.raises(UserError, match="tiles, and this page shows 256: take scripts/decompress.py"):
        open_file(tiny, wide, "wide")


def settings_of(fit):
    return Settings(goal=Goal("tokens", 1), fit=FITS[fit])


def test_either_bundled_model_opens_its_files(bundled):
    for name in TOKENIZERS:
        codec = bundled.codec(name)
        opened = open_file(bundled, prepare(codec, photo(32, 32), "photo").files[0], "photo")
        assert opened.model == name


def test_a_target_is_for_an_image_and_not_for_the_one_before_a_file(tiny, codec):
    page = pytest.importorskip("playground.page", reason="Gradio is not installed")
    before = prepare(codec, photo(SIDE, SIDE), "before")
    file = open_file(tiny, before.files[-1], "file")
    with pytest.raises(UserError, match="a .1dp file is shown"):
        page.Compress(tiny).find(before, file, next(iter(page.TARGETS)), 5)
    assert page.Compress(tiny).find(before, None, next(iter(page.TARGETS)), 5)[0] in before.lengths


# Uploads


def test_an_upload_is_gone_when_it_is_read(tmp_path):
    path = tmp_path / "a1b2" / "photo.png"
    path.parent.mkdir()
    path.write_bytes(b"bytes")
    assert uploads.take(path) == b"bytes"
    assert not path.parent.exists() and tmp_path.exists()


def test_uploads_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 100)
    for data, words in ((bytes(101), "has 101 bytes, and this page takes 100"), (b"", "is empty")):
        (tmp_path / "photo.png").write_bytes(data)
        with pytest.raises(UserError, match=words):
            uploads.take(tmp_path / "photo.png")
        assert not (tmp_path / "photo.png").exists()
        tmp_path.mkdir(exist_ok=True)
    monkeypatch.setattr(uploads, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="the image has 11 x 10 pixels"):
        uploads.open_image(png(Image.new("RGB", (11, 10))))
    with pytest.raises(UserError, match="expected a whole image"):
        uploads.open_image(b"a text")


def test_a_compressed_file_is_told_by_its_name_or_its_bytes(codec):
    data = prepare(codec, photo(SIDE, SIDE), "photo").files[0]
    assert uploads.is_compressed("photo.1DP", b"") and uploads.is_compressed("photo", data)
    assert not uploads.is_compressed("photo.png", png(photo(8, 8)))


# Generate


@pytest.fixture(scope="module")
def painter(bundled):
    return bundled.painter("maskgit_fashion")


def test_an_image_is_the_one_that_the_command_makes(painter):
    settings = painter.settings
    made = generate(painter, 5, 42, settings)
    tokens, pixels = next(
        sample(painter.generator, painter.tokenizer, [(5, 0)], settings=settings, seed=42, batch_size=1)
    )
    np.testing.assert_array_equal(made.steps[-1], tokens[0])
    expected = (pixels[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(made.frames[-1], expected)
    assert np.abs(made.guesses[-1].astype(int) - expected).max() <= 1
    assert "Sandal, seed 42" in made.about


def test_the_steps_fill_the_tokens(painter):
    made = generate(painter, 0, 1, SamplerSettings(num_sample_steps=4))
    known = (made.steps < made.codebook_size).sum(axis=1).tolist()
    assert len(known) == 5 and known[0] == 0 and known[-1] == 32 and known == sorted(set(known))
    shown = drawing.sampled(made, 8, codebook_colours(painter.tokenizer))
    assert shown.count("hollow") == sum(32 - count for count in known) and "8 tokens" in shown


def test_a_draft_has_its_tokens_alone(painter):
    made = generate(painter, 0, 1, SamplerSettings(num_sample_steps=4, num_tokens=6))
    assert made.steps.shape == (5, 6) and made.lengths.tolist() == [1, 2, 3, 4, 5, 6] and len(made.frames) == 6
    assert np.abs(made.guesses[-1].astype(int) - made.frames[-1]).max() <= 1
    assert "of 6<" in drawing.sampled(made, 6, codebook_colours(painter.tokenizer))


def test_what_cannot_be_sampled_is_refused_in_words(painter):
    with pytest.raises(UserError, match="a seed is a whole number"):
        generate(painter, 0, -1, painter.settings)
    with pytest.raises(UserError, match="1 to 64 steps, got 65"):
        generate(painter, 0, 0, SamplerSettings(num_sample_steps=65))


# Tokens


def test_a_replaced_token_changes_the_image_where_the_heat_map_says(codec):
    prepared = prepare(codec, photo(SIDE, SIDE), "photo")
    explored = explore(codec, prepared.tokens, "photo")
    found = replacements(codec, explored, 2)
    assert explored.tokens[2] not in found.codes and found.heat.shape == (SIDE, SIDE)
    assert found.heat.max() == pytest.approx(1) and found.mean > 0
    taken = with_code(codec, explored, 2, int(found.codes[0]))
    np.testing.assert_array_equal(taken.image, found.images[0])
    assert (taken.tokens != taken.original).nonzero()[0].tolist() == [2]
    assert (replacements(codec, explored, 2, seed=1).codes != found.codes).any()
    row = drawing.token_row(taken, codebook_colours(codec.tokenizer), 2)
    assert row.count("<button") == NUM_TOKENS and row.count("selected changed") == 1


def test_what_stands_on_a_token_can_be_read(codec):
    explored = explore(codec, prepare(codec, photo(SIDE, SIDE), "photo").tokens, "photo")
    for grey, ink in ((60, "#fff"), (110, "#fff"), (140, "#000"), (240, "#000")):
        colours = np.full((codec.tokenizer.codebook_size, 3), grey, np.uint8)
        assert f"background:#{grey:02x}{grey:02x}{grey:02x};color:{ink}" in drawing.token_row(explored, colours, None)


def test_of_tiles_the_middle_one_is_looked_at(codec):
    prepared = prepare(codec, photo(40, 30), "photo", "tile")
    explored = explore(codec, prepared.tokens, "photo")
    assert "its middle tile of" in explored.about
    np.testing.assert_array_equal(explored.tokens, prepared.tokens[len(prepared.tokens) // 2])


def test_a_file_is_looked_at_as_far_as_it_goes(tiny, codec):
    prepared = prepare(codec, photo(SIDE, SIDE), "photo")
    data = prepared.files[-1]
    explored = explore_file(codec, open_file(tiny, data, "photo"))
    np.testing.assert_array_equal(explored.tokens, prepared.tokens[0])
    few = explore_file(codec, open_file(tiny, data[:-1], "photo"))
    assert 0 < len(few.tokens) < NUM_TOKENS
    np.testing.assert_array_equal(few.tokens, prepared.tokens[0, : len(few.tokens)])
    assert replacements(codec, few, len(few.tokens) - 1).mean > 0
    tiles = prepare(codec, photo(40, 30), "photo", "tile").files[-1]
    assert "its middle tile of" in explore_file(codec, open_file(tiny, tiles, "photo")).about
    cut = next(size for size in range(len(tiles)) if (read := read_of(codec, tiles[:size])) and read.certain[0])
    with pytest.raises(UserError, match="was cut before its middle tile"):
        explore_file(codec, open_file(tiny, tiles[:cut], "photo"))


def read_of(codec, data):
    with contextlib.suppress(UserError):  # nothing of it is certain
        return codec.read(data)


def test_a_test_image_is_first_among_those_like_it(bundled):
    codec = bundled.codec("one-d-piece_emoji")
    known = first_tokens(codec)
    image = Image.fromarray(known.images[7])
    found = alike(codec, prepare(codec, image, "test").tokens[0])
    same = known.codes == known.codes[7]
    assert found.num_same == same.sum() and found.total == len(known.images) == 468
    assert any((picture == known.images[7]).all() for picture in found.images[: found.num_same])


def test_another_model_has_the_bundled_images_to_compare(codec):
    known = first_tokens(codec)
    assert len(known.images) > 20 and known.images.shape[1:] == (SIDE, SIDE, 3)


def test_alike_codes_have_alike_colours(bundled):
    tokenizer = bundled.codec("one-d-piece_emoji").tokenizer
    colours = codebook_colours(tokenizer).astype(float)
    with torch.inference_mode():
        vectors = tokenizer.quantize.lookup(torch.arange(tokenizer.codebook_size))
        nearest = (torch.cdist(vectors, vectors) + 9 * torch.eye(len(vectors))).argmin(dim=1)
    to_nearest = np.linalg.norm(colours - colours[nearest], axis=1).mean()
    assert to_nearest < 0.5 * np.linalg.norm(colours - colours[::-1], axis=1).mean()


# The page


def test_a_file_name_cannot_write_into_the_page(tiny, codec):
    prepared = prepare(codec, photo(SIDE, SIDE), HOSTILE)
    opened = open_file(tiny, prepared.files[-1], HOSTILE)
    explored = explore(codec, prepared.tokens, HOSTILE)
    for shown in (
        drawing.stage(prepared, 2),
        drawing.opened(opened, cut(codec, opened, 100)),
        drawing.explored_image(explored),
    ):
        assert HOSTILE not in shown and 'onerror="' not in shown


def test_the_examples_are_there(bundled, tiny):
    assert {example.model for example in bundled.examples()} == set(TOKENIZERS)
    assert [example.name for example in tiny.examples()] == list(PHOTOGRAPHS)
    for example in bundled.examples():
        uploads.open_image(example.path.read_bytes())


def test_gradio_is_imported_by_the_page_alone():
    for path in (ROOT / "playground").glob("*.py"):
        names = [node.names[0].name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
        assert ("gradio" in names) == (path.name == "page.py"), path


def test_without_gradio_the_command_says_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; sys.argv = ['demo.py']; import runpy; "
    code += "runpy.run_path('scripts/demo.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "error: the page needs Gradio" in result.stderr and "pip install -c constraints.txt" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--port", "70000"), "--port must be 1 to 65535, got 70000"),
        (("--host", "192.0.2.1"), "--host 192.0.2.1 is no address of this computer ("),
        (("--host", "no host"), "--host no host is no address of this computer ("),
    ],
)
def test_a_place_where_no_server_can_listen_is_said_before_models_are_loaded(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    with pytest.raises(UserError, match=re.escape(message)):
        demo.parse_arguments()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_place_where_a_server_can_listen_is_taken(monkeypatch, host):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--host", host])
    assert demo.parse_arguments().host == host


def test_decoding_one_row_of_tokens_gives_one_image(codec):
    assert decode(codec, np.zeros((1, NUM_TOKENS), int)).shape == (1, SIDE, SIDE, 3)
