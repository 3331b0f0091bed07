"""The page with a slider in a real browser: a photograph goes in, a file comes out, is decoded, and is dropped back."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.browser import PATIENCE, chromium, find_chromium
from tests.slurm_cluster import free_ports
from utils.paths import ROOT

PHOTOGRAPH = ROOT / "assets/photos/flower.png"  # no model was trained on photographs
LONGEST = 600  # seconds until the server has started or ended: it imports and loads everything
pytestmark = [pytest.mark.xdist_group("playground_page")]
# Moves the slider over every number of tokens; gives the ms from each move until the page shows it.
MOVE = """async () => {
  const input = document.querySelector('#tokens input[type=range]'), times = [];
  const shown = () => document.querySelector('#stage [data-name=tokens] dd')?.firstChild.data;
  const set = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;
  for (let number = 1; number <= 32; number++) {
    if (shown() == number) continue;
    const start = performance.now();
    set.call(input, number);
    input.dispatchEvent(new Event('input', {bubbles: true}));
    while (shown() != number) await new Promise(done => setTimeout(done, 1));
    times.push(performance.now() - start);
  }
  return times;
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page, served by the command itself; `uploads` is where it keeps what visitors send."""
    pytest.importorskip("gradio", reason="Gradio is not installed")
    find_chromium()
    (port,) = free_ports(1)
    folder = tmp_path_factory.mktemp("server")
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "scripts/demo.py", "--port", str(port), "--device", "cpu"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
            stdout=log,
            stderr=log,
        )
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_for(url, process, folder / "log")
        yield SimpleNamespace(url=url, port=port, folder=folder, process=process)
    finally:
        process.terminate()
        assert process.wait(LONGEST) == 143
        assert not list(folder.glob("one-d-piece-*"))


def wait_for(url, process, log):
    """Return when the page is served; what is not there yet, or too busy to answer, is asked again."""
    end = time.monotonic() + LONGEST
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=30).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(server, browser):
    """Open the page as a new visitor. No request may leave this machine, and nothing may fail in the page."""
    contexts, faults = [], []

    def watch(request):
        if not request.url.startswith((server.url, "data:", "blob:")):
            faults.append(request.url)

    def visit():
        context = browser.new_context(viewport={"width": 1280, "height": 1000}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", watch)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#stage .compared")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert faults == []


def drop(page, path):
    page.set_input_files("#drop input[type=file]", str(path))


def number(page, name):
    return page.locator(f"#stage [data-name={name}] dd").evaluate("cell => cell.firstChild.data")


def move(page, slider, value):
    page.fill(f"#{slider} input[type=number]", str(value))
    page.press(f"#{slider} input[type=number]", "Enter")


def wait_until(page, name, value):
    page.wait_for_function(
        "([name, value]) => document.querySelector(`#stage [data-name=${name}] dd`)?.firstChild.data == value",
        arg=[name, value],
    )


def download(page, folder):
    with page.expect_download() as waiting:
        page.click("a.download")
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_photograph_becomes_a_file_that_decodes_and_comes_back(visit, tmp_path):
    page = visit()
    drop(page, PHOTOGRAPH)
    page.wait_for_selector("a[download='flower_12.1dp']")
    seen = {}
    for tokens in (1, 20, 32):
        move(page, "tokens", tokens)
        wait_until(page, "tokens", str(tokens))
        seen[tokens] = {name: float(number(page, name)) for name in ("file", "rate", "PSNR", "SSIM")}
        assert seen[tokens]["rate"] == pytest.approx(8 * seen[tokens]["file"] / 32**2, abs=1e-3)
    assert seen[1]["file"] < seen[20]["file"] < seen[32]["file"] and seen[1]["PSNR"] < seen[20]["PSNR"]

    move(page, "tokens", 20)
    wait_until(page, "tokens", "20")
    path = download(page, tmp_path)
    assert path.name == "flower_20.1dp" and path.stat().st_size == seen[20]["file"]
    command = [sys.executable, "scripts/decompress.py", str(path), "-o", str(tmp_path / "flower.png")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert Image.open(tmp_path / "flower.png").size == (256, 256)

    drop(page, path)
    page.wait_for_selector("#stage .bytes")
    assert page.locator("#stage .bytes i").count() == path.stat().st_size
    assert number(page, "tokens") == "20"
    move(page, "end", path.stat().st_size - 4)
    wait_until(page, "file", str(path.stat().st_size - 4))
    assert 0 < int(number(page, "tokens")) < 20 and page.locator("#stage .bytes .gone").count() == 4
    page.click("#complete")
    page.wait_for_selector("text=invented by maskgit_emoji")
    move(page, "end", 3)
    page.wait_for_selector("text=Not one token is left")
    assert page.locator("text=invented by").count() == 0
    page.click("button[role=tab]:has-text('Tokens')")
    page.wait_for_selector("#row button")
    assert page.locator("#row button").count() == 20, "the file's own tokens, not those of the image before it"


def test_an_example_is_shown_by_a_click(visit, tmp_path):
    """Draws the page: pytest -k by_a_click --basetemp FOLDER leaves it there."""
    page = visit()
    page.set_viewport_size({"width": 1240, "height": 1000})
    page.click("#examples button[title=pizza]")
    page.wait_for_selector("a[download='pizza_12.1dp']")
    page.screenshot(path=tmp_path / "demo.png", full_page=True)
    assert Image.open(tmp_path / "demo.png").width == 1240


def test_the_slider_answers_at_once(visit):
    """Prints the time from a move to the image on the page: pytest -s -k answers_at_once."""
    page = visit()
    times = sorted(page.evaluate(MOVE))
    median = statistics.median(times)
    print(f"\nslider: {median:.0f} ms in the median, {times[-2]:.0f} ms for 95 % of {len(times)} moves")
    assert median < 1000  # on a machine that is busy otherwise; 100 ms and less is what is measured on an idle one


def test_visitors_do_not_see_one_another_and_uploads_are_deleted(visit, server):
    one, other = visit(), visit()
    drop(one, PHOTOGRAPH)
    one.wait_for_selector("a[download='flower_12.1dp']")
    move(other, "tokens", 5)
    other.wait_for_selector("a[download='dolphin_5.1dp']")
    move(one, "tokens", 6)
    one.wait_for_selector("a[download='flower_6.1dp']")
    (uploads,) = server.folder.glob("one-d-piece-*")
    assert sum(path.stat().st_size for path in uploads.rglob("*") if path.is_file()) == 0  # Gradio leaves empty ones


def test_wrong_and_too_large_files_are_refused_in_words(visit, tmp_path):
    page = visit()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes((20 << 20) + 1))
    (tmp_path / "old.1dp").write_bytes(b"GIF89a")
    for name, words in (
        ("text.png", "expected a whole image"),
        ("old.1dp", "this is no .1dp file"),
        ("large.png", "exceed the maximum allowed size of 20.0 Mb"),
    ):
        drop(page, tmp_path / name)
        page.wait_for_selector(f".toast-body:has-text('{words}')")
    assert page.locator("a[download='dolphin_12.1dp']").count() == 1  # what was shown still is


def test_an_image_is_pasted(visit):
    page = visit()
    page.evaluate(
        """async address => {
          const data = new DataTransfer();
          data.items.add(new File([await (await fetch(address)).blob()], 'pasted.png', {type: 'image/png'}));
          document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data}));
        }""",
        page.locator("#examples img >> nth=5").get_attribute("src"),
    )
    page.wait_for_selector("a[download='pasted_12.1dp']")


def test_a_target_moves_the_slider(visit):
    page = visit()
    page.fill("#value input", "22")
    page.click("#find")
    page.wait_for_function("+document.querySelector('#stage [data-name=PSNR] dd').firstChild.data >= 22")
    wait_until(page, "tokens", page.input_value("#tokens input[type=number]"))
    page.fill("#value input", "90")
    page.click("#find")
    page.wait_for_selector(".toast-body:has-text('out of reach')")


def test_images_are_generated_and_decoded_coarse_to_fine(visit):
    page = visit()
    page.click("button[role=tab]:has-text('Generate')")
    page.click("#generate")
    page.wait_for_selector("#made .strip")
    assert page.locator("#made .strip >> nth=1").locator("figure").count() == 9  # before, and after each of 8 steps
    move(page, "made_tokens", 4)
    page.wait_for_function("document.querySelector('#made [data-name=tokens] dd').firstChild.data == '4'")


def test_a_token_is_replaced_by_clicks(visit):
    page = visit()
    page.click("button[role=tab]:has-text('Tokens')")
    page.wait_for_selector("#row button")
    page.wait_for_selector("#alike .strip")
    before = page.locator("#explored img").get_attribute("src")
    page.click("#row button >> nth=0")
    page.wait_for_selector("#changes .others")
    page.click("#changes .others button >> nth=0")
    page.wait_for_selector("#row button.changed")
    assert page.locator("#explored img").get_attribute("src") != before
    page.click("#reset")
    page.wait_for_selector("#row button.changed", state="detached")
    assert page.locator("#explored img").get_attribute("src") == before


def test_the_server_gives_away_no_other_files(server):
    for path in (ROOT / "pyproject.toml", Path("/etc/hostname"), Path(tempfile.gettempdir())):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}", timeout=30)
        assert refused.value.code in (403, 404)


def test_a_taken_port_is_one_line(server):
    command = [sys.executable, "scripts/demo.py", "--port", str(server.port), "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == f"error: port {server.port} is taken: name another one as --port\n"
