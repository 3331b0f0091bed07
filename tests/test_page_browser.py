"""The static page in a real browser: images in, files out, files in, and no word to another host."""

import contextlib
import io
import re
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image

from codec.bitstream import Fit, Mode
from codec.canvas import to_canvas
from codec.entropy import read_tokens
from codec.files import Settings, load_codec
from codec.rate import goal_of
from modeling.tokenizers import encode_tokens
from tests.browser import PATIENCE, chromium, served
from utils.paths import ROOT

pytestmark = [pytest.mark.xdist_group("page")]
PHOTO = ROOT / "assets/photos/coffee.png"  # nothing like it was in training
EMOJI = ROOT / "assets/emoji/pizza.png"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the page as `make page` assembles it."""
    folder = tmp_path_factory.mktemp("page")
    subprocess.run(["make", "-s", "page", f"PAGE_DIR={folder}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with served(folder) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(browser, site):
    """Open the page at an address behind its own; what it says on its console, and to whom, is checked at the end."""
    contexts, said, asked = [], [], []

    def visit(address="", during=None, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        if during:  # an act for the page, while a request of these is under way

            def act_and_go_on(route):
                during[1](page)
                route.continue_()

            page.route(during[0], act_and_go_on)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(site + address)
        page.wait_for_selector("#shown[data-tokens]")
        return page

    visit.said = said
    yield visit
    for context in contexts:
        context.close()
    assert not said
    assert [url for url in asked if not url.startswith((site, "blob:", "data:"))] == []


@pytest.fixture(scope="module")
def codec():
    return load_codec(checkpoint="one-d-piece_emoji")


def show(page, length):
    page.locator("#slider").fill(str(length))
    page.wait_for_selector(f"#shown[data-tokens='{length}']")


def choose(page, path_or_file, name):
    """Give the page a file, and wait until it is shown."""
    page.locator("#chooser").set_input_files(path_or_file)
    page.wait_for_selector(f"#shown[data-name='{name}']")


def as_file(data, name="given.1dp"):
    return {"name": name, "mimeType": "application/octet-stream", "buffer": data}


def saved(page, button="#save"):
    with page.expect_download() as download:
        page.locator(button).click()
    return download.value.path().read_bytes()


def tokens_of(codec, path, fit=Fit.CROP):
    square = torch.tensor(to_canvas(Image.open(path), fit, codec.side).squares).permute(0, 3, 1, 2)
    return encode_tokens(codec.tokenizer, square / 255)[0].tolist()


def test_a_photograph_is_saved_as_a_file_that_python_reads_to_the_same_tokens(visit, codec):
    page = visit()
    choose(page, PHOTO, PHOTO.name)
    for length in (12, 1, 32):
        show(page, length)
        data = saved(page)
        read = read_tokens(data, codec.models)
        assert read.tokens[0].tolist() == tokens_of(codec, PHOTO)[:length]
        assert page.locator("#size").inner_text() == str(len(data))
        assert page.locator("#bytes").inner_text().split() == [f"{byte:02x}" for byte in data]
        assert (read.header.geometry.width, read.header.geometry.height) == Image.open(PHOTO).size


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_an_image_that_is_no_square_is_fitted_as_python_fits_it(visit, codec, tmp_path, fit):
    path = tmp_path / "wide.png"
    Image.open(PHOTO).crop((0, 40, 250, 140)).save(path)
    page = visit()
    choose(page, path, path.name)
    page.locator("#fit").select_option(fit)
    page.wait_for_selector(f"#shown[data-name='wide.png'][data-fit='{fit}']")
    show(page, 32)
    read = read_tokens(saved(page), codec.models)
    assert read.tokens[0].tolist() == tokens_of(codec, path, Fit[fit.upper()])
    assert read.header.geometry.fit == Fit[fit.upper()] and read.header.geometry.width == 250
    assert Image.open(io.BytesIO(saved(page, "#save-image"))).size == (250, 100)


def test_a_photograph_in_tiles_is_saved_with_the_tokens_that_python_gives_them(visit, codec, tmp_path):
    path = tmp_path / "small.png"
    Image.open(PHOTO).resize((60, 40)).save(path)
    page = visit()
    page.locator("#fit").select_option("tiles")
    choose(page, path, path.name)
    show(page, 3)
    read = read_tokens(saved(page), codec.models)
    squares = torch.tensor(to_canvas(Image.open(path), Fit.TILE, codec.side).squares).permute(0, 3, 1, 2)
    assert read.tokens.tolist() == encode_tokens(codec.tokenizer, squares / 255)[:, :3].tolist()
    assert read.header.geometry.tiles.columns == 2 and len(read.tokens) == 4


def test_a_tall_image_of_tiles_is_shown_whole(visit, tmp_path):
    path = tmp_path / "tall.png"
    Image.open(PHOTO).resize((40, 90)).save(path)
    page = visit()
    page.locator("#fit").select_option("tiles")
    choose(page, path, path.name)
    show(page, 1)
    for name in ("original", "shown"):
        box, frame = (page.locator(which).bounding_box() for which in (f"#{name}", f".frame:has(#{name})"))
        assert box == pytest.approx(frame, abs=1)


def test_pythons_numbers_and_images_are_shown(visit, codec, tmp_path):
    path = tmp_path / "small.png"
    Image.open(EMOJI).convert("RGB").resize((32, 32)).save(path)
    page = visit()
    choose(page, path, path.name)
    show(page, 32)
    settings = Settings(goal_of(tokens=32), mode=Mode.NETWORK)
    (written,) = codec.compress([Image.open(path)], settings)
    lengths = [written.num_tokens, 32]  # the best of at most 32
    show(page, lengths[0])
    assert float(page.locator("#psnr").inner_text()) == pytest.approx(written.psnr, abs=0.02)
    assert float(page.locator("#rate").inner_text()) == pytest.approx(8 * len(written.data) / 32**2, abs=6e-4)
    found = np.asarray(Image.open(io.BytesIO(saved(page, "#save-image"))).convert("RGB"))
    (expected,) = codec.decompress([written.data])
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_a_file_of_the_other_model_brings_it_along(visit):
    garments = load_codec(checkpoint="one-d-piece_fashion")
    (written,) = garments.compress([Image.open(ROOT / "assets/fashion/bag.png")], Settings(goal_of(tokens=20)))
    page = visit()
    choose(page, as_file(written.data), "given.1dp")
    assert page.locator("#models input:checked").get_attribute("value") == "one-d-piece_fashion"
    show(page, written.num_tokens)
    assert saved(page) == written.data
    found = Image.open(io.BytesIO(saved(page, "#save-image"))).convert("RGB")
    (expected,) = garments.decompress([written.data])
    assert np.abs(np.asarray(found, int) - np.asarray(expected)).max() <= 1
    assert page.locator("#no-original").is_visible()


def test_tiles_and_what_is_left_of_a_cut_file_are_shown(visit, codec):
    (written,) = codec.compress([Image.open(PHOTO).resize((90, 60))], Settings(goal_of(max_bytes=120), Fit.TILE))
    page = visit()
    page.locator("#slider").fill("32")
    choose(page, as_file(written.data), "given.1dp")
    page.wait_for_selector("#save:enabled")
    assert saved(page) == written.data
    found = Image.open(io.BytesIO(saved(page, "#save-image"))).convert("RGB")
    (expected,) = codec.decompress([written.data])
    assert found.size == (90, 60) and np.abs(np.asarray(found, int) - np.asarray(expected)).max() <= 1
    (single,) = codec.compress([Image.open(EMOJI)], Settings(goal_of(tokens=32)))
    cut = single.data[:-4]
    choose(page, as_file(cut, "cut.1dp"), "cut.1dp")
    assert f"{len(cut)} bytes of it are here" in page.locator("#message").inner_text()
    certain = int(read_tokens(cut, codec.models).certain[0])
    assert page.locator("#count-of").inner_text() == f"of {certain}"


# Acts in the page as soon as the first tile of an image is being encoded: soon all of them are.
AT_THE_FIRST_TILE = """act => {
  const loading = document.getElementById("loading");
  new MutationObserver((_, observer) => {
    if (loading.hidden || !loading.textContent.startsWith("Encoding: tile")) return;
    observer.disconnect();
    eval(act);
  }).observe(loading, {attributes: true, childList: true, subtree: true});
}"""
CHANGES = {
    "fit": "const fit = document.getElementById('fit'); fit.value = '1'; fit.dispatchEvent(new Event('change'))",
    "model": "document.querySelector('#models input:not(:checked)').click()",
    "image": """const given = new DataTransfer(), chooser = document.getElementById('chooser');
        given.items.add(new File(['hello'], 'notes.txt'));
        chooser.files = given.files;
        chooser.dispatchEvent(new Event('change'))""",
}


def give_tiles(page, path, act, name="large.png"):
    """Give the page an image of many tiles, and have it act while that is being encoded."""
    Image.open(PHOTO).resize((256, 256)).save(path / name)
    page.locator("#fit").select_option("tiles")
    page.wait_for_selector("#shown[data-fit='tile']")
    page.evaluate(AT_THE_FIRST_TILE, act)
    page.locator("#chooser").set_input_files(path / name)
    return name


@pytest.mark.parametrize("change", ["fit", "model"])
def test_a_change_while_an_own_image_is_opened_is_for_that_image(visit, tmp_path, change):
    page = visit(bypass_csp=True)
    was = page.locator("#models input:checked").get_attribute("value")
    name = give_tiles(page, tmp_path, CHANGES[change])
    page.wait_for_selector(f"#shown[data-name='{name}'][data-fit='{'pad' if change == 'fit' else 'tile'}']")
    assert (page.locator("#models input:checked").get_attribute("value") == was) == (change == "fit")
    page.locator("#loading").wait_for(state="hidden")
    assert page.locator("#shown").get_attribute("data-name") == name


def test_how_far_an_image_is_that_another_has_replaced_is_not_shown(visit, tmp_path):
    page = visit(bypass_csp=True)
    give_tiles(page, tmp_path, CHANGES["image"])
    page.locator("#message", has_text="notes.txt is no image").wait_for()
    for _ in range(20):
        assert page.locator("#loading").is_hidden()
        page.wait_for_timeout(20)


def test_a_change_while_the_first_image_is_opened_is_for_that_image(visit):
    acts = []

    def choose_pad(page):
        acts.append("pad")
        page.locator("#fit").select_option("pad")

    page = visit(during=("**/model.safetensors", choose_pad))
    page.wait_for_selector("#shown[data-fit='pad']")
    assert acts == ["pad"]


WRONG = [
    ("notes.txt", b"hello", "notes.txt is no image that this browser can read"),
    ("broken.1dp", b"\x1d\x52\x87\x79", "ends within its header"),
    ("future.1dp", b"\x1d\x56\x87\x79", "of version 2"),
    ("other.1dp", bytes.fromhex("1d50a1b28a0404cc81403ffc"), "a tokenizer that this page does not have (a1b2)"),
]


def test_what_cannot_be_opened_is_said_and_the_page_goes_on(visit):
    page = visit()
    message = page.locator("#message")
    for name, data, words in WRONG:
        # The worker logs its errors, and the page may show them before that is heard of here.
        is_of_worker = name.endswith(".1dp")
        with page.expect_console_message() if is_of_worker else contextlib.nullcontext():
            page.locator("#chooser").set_input_files(as_file(data, name))
            message.filter(has_text=words).wait_for()
    visit.said.clear()
    choose(page, EMOJI, EMOJI.name)
    assert message.is_hidden()


def test_a_link_holds_the_image(visit):
    page = visit()
    choose(page, EMOJI, EMOJI.name)
    page.locator("#link").click()
    page.locator("#message").wait_for()
    address = re.search(r"#[\w-]+$", page.url)[0]
    other = visit(address)
    assert other.locator("#bytes").inner_text() == page.locator("#bytes").inner_text()


def test_the_link_in_the_address_goes_when_another_image_is_shown(visit):
    page = visit()
    plain = page.url
    page.locator("#link").click()
    page.locator("#message").wait_for()
    page.locator("#chooser").set_input_files(as_file(b"hello", "notes.txt"))
    page.locator("#message", has_text="notes.txt is no image").wait_for()
    assert "#" in page.url
    choose(page, EMOJI, EMOJI.name)
    assert page.url == plain


def test_a_phone_shows_all_of_it(visit):
    page = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    for part in page.locator("section, header, footer, #bars, #slider, #strip, #bytes").all():
        box = part.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360


STEPS = """async () => {
  const slider = document.getElementById("slider"), shown = document.getElementById("shown");
  const steps = async () => {
    const times = [];
    for (let length = 1; length <= 32; length++) {
      const begin = performance.now();
      slider.value = length;
      slider.dispatchEvent(new Event("input"));
      while (shown.dataset.tokens !== String(length)) await new Promise((resolve) => setTimeout(resolve));
      times.push(performance.now() - begin);
    }
    return times;
  };
  return [await steps(), await steps()];
}"""


def test_times_are_told(browser, site):
    """Prints, and asserts nothing of times: pytest -s tests/test_page_browser.py -k times."""
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    begin = time.monotonic()
    page.goto(site)
    page.wait_for_selector("#shown[data-tokens]")
    first = time.monotonic() - begin
    decoded, known = page.evaluate(STEPS)
    context.close()
    middle = {name: sorted(times)[len(times) // 2] for name, times in (("decoded", decoded), ("known", known))}
    print(f"\nfirst image after {first:.2f} s; a step of the slider takes {middle['decoded']:.0f} ms, the longest")
    print(f"{max(decoded):.0f} ms, where its image is to be decoded, and {middle['known']:.1f} ms where it was")
    assert len(decoded) == len(known) == 32
