"""`looc-ldm demo`: the page through gradio's client and in a browser, the folder of a Space, and what is refused."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from looc_ldm import LooCLDMPipeline, starter_model
from looc_ldm.codes.images import decode_image
from looc_ldm.demo.codecs import QUALITIES, compare, of_size
from looc_ldm.models.loading import load_autoencoder
from tiny import refusal, run

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def address(pipeline):
    """The address of the page of a tiny model."""
    pytest.importorskip("gradio")
    from looc_ldm.demo.page import launch

    page = launch([pipeline], "cpu", server_name="127.0.0.1")
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=True)


@pytest.fixture
def upload(tmp_path):
    """An image of 14x20 pixels, as the client sends it."""
    from gradio_client import handle_file

    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 14, 3), np.uint8)).save(tmp_path / "noise.png")
    return handle_file(tmp_path / "noise.png")


def pixels(file: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(file).convert("L"))


# The page -------------------------------------------------------------------------------------------------------------


def test_samples_are_a_grid_of_large_pixels_and_the_seed_decides_them(client, pipeline):
    grid = pixels(client.predict("square", 1.5, 2, 7, "2 × 2", api_name="/sample"))
    assert grid.shape == (512, 512)
    small = grid[::16, ::16]
    assert np.array_equal(np.kron(small, np.ones((16, 16), int)), grid)
    again, other = (pixels(client.predict("square", 1.5, 2, s, "2 × 2", api_name="/sample")) for s in (7, 8))
    assert np.array_equal(grid, again)
    assert np.array_equal(small[:16, 16:], other[::16, ::16][:16, :16])  # the second image has the next seed


def test_the_classes_come_in_turn(client):
    every = pixels(client.predict("every class in turn", 1, 2, 0, "2 × 2", api_name="/sample"))[::16, ::16]
    first, fourth = (pixels(client.predict("circle", 1, 2, s, "1 × 1", api_name="/sample"))[::32, ::32] for s in (0, 3))
    assert np.abs(every[:16, :16].astype(int) - first).max() <= 1
    assert np.abs(every[16:, 16:].astype(int) - fourth).max() <= 1  # after three classes the first again


def test_variations_come_from_the_upload(client, upload):
    grid = pixels(client.predict(upload, 0.5, "no class", 1, 4, 0, api_name="/vary"))
    assert grid.shape == (512, 512)
    assert len({grid[y : y + 256, x : x + 256].tobytes() for y in (0, 256) for x in (0, 256)}) == 4


def test_inpainting_keeps_what_is_not_painted(client, tmp_path):
    from gradio_client import handle_file

    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))
    layer = PIL.Image.new("RGBA", (512, 512))
    image.save(tmp_path / "image.png")

    def inpaint():
        layer.save(tmp_path / "layer.png")
        painted = {"background": handle_file(tmp_path / "layer.png"), "layers": [handle_file(tmp_path / "layer.png")]}
        file = handle_file(tmp_path / "image.png")
        return client.predict(file, painted | {"composite": None}, "circle", 1, 2, 0, api_name="/inpaint")

    with pytest.raises(Exception, match="Nothing is painted"):
        inpaint()
    layer.paste((213, 94, 0, 255), (0, 0, 250, 512))
    drawn = pixels(inpaint())[::32, ::32]
    assert np.array_equal(drawn[:, 8:], np.asarray(image)[:, 8:])
    assert not np.array_equal(drawn[:, :8], np.asarray(image)[:, :8])


def test_tokenizing_gives_the_rate_a_looc_file_and_a_map(client, pipeline, upload):
    text, file, original, reconstruction, _, _, codes = client.predict(upload, api_name="/tokenize")
    assert (
        "14 × 20 pixels become 7 × 10 positions with 2 codes each, of 16 codevectors: **2.000 bits per pixel**" in text
    )
    content = Path(file).read_bytes()
    assert f"| LooC | {len(content)} |" in text
    assert Path(file).name == "noise.looc"
    decoded = np.asarray(decode_image(load_autoencoder(pipeline), content))
    factor = pixels(original).shape[0] // 20
    assert np.array_equal(pixels(reconstruction)[::factor, ::factor], decoded)
    assert len(PIL.Image.open(codes).convert("RGB").getcolors()) <= 16 + 1  # and the gap


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.png", b"no image", "cannot read the upload: not an image, or in a format that Pillow does not know"),
        ("a.png", b"", "cannot read the upload: the file is empty"),
        ("a.svg", b"<svg/>", "cannot read the upload: not an image"),
        (None, None, "There is no image yet"),
    ],
)
@pytest.mark.parametrize("tab", ["/vary", "/tokenize"])
def test_a_bad_upload_is_answered_in_a_sentence(name, content, sentence, tab, client, tmp_path):
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    file = None
    if name:
        (tmp_path / name).write_bytes(content)
        file = handle_file(tmp_path / name)
    rest = [0.5, "circle", 1, 4, 0] if tab == "/vary" else []
    with pytest.raises(AppError) as refused:
        client.predict(file, *rest, api_name=tab)
    assert str(refused.value).startswith(sentence)
    assert str(tmp_path) not in str(refused.value)


@needs_gradio
def test_nothing_is_reported_to_gradio(pipeline):
    from looc_ldm.demo.page import make_page

    assert not make_page({"one": LooCLDMPipeline.from_pretrained(pipeline)}).analytics_enabled


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_draws_a_picture_in_a_browser(address):
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.get_by_role("button", name="Draw images").click()
        picture = page.locator(".picture img")
        picture.wait_for()
        page.wait_for_function("document.querySelector('.picture img').naturalWidth > 0")
        assert picture.evaluate("image => image.naturalWidth") == 48 * 11  # three images, enlarged to about 512 pixels
        assert picture.bounding_box()["width"] > 200
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        browser.close()


# Codecs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_a_codec_has_the_highest_quality_that_fits_or_its_smallest_file(codec):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8))
    sizes = [len(of_size(image, codec, 0).content), len(of_size(image, codec, 10**6).content)]
    assert of_size(image, codec, 0).name.endswith(", smallest file")
    assert of_size(image, codec, 10**6).name.endswith(f", quality {QUALITIES[-1]}")
    between = of_size(image, codec, sum(sizes) // 2)
    assert sizes[0] < len(between.content) <= sum(sizes) // 2
    assert between.image.mode == "L"


def test_the_starter_model_is_compared_with_jpeg_and_webp():
    image = PIL.Image.open(Path(starter_model("fashion_mnist")) / "samples.png").convert("L").crop((0, 0, 32, 32))
    looc, *others = compare(load_autoencoder("fashion_mnist"), image)
    assert len(looc.content) == 49 + 128  # the header, and 8x8 positions with 2 codes of 8 bits
    assert [file.name.partition(",")[0] for file in others] == ["JPEG", "WebP"]
    assert all(len(file.content) <= len(looc.content) or file.name.endswith("smallest file") for file in others)


# The command ----------------------------------------------------------------------------------------------------------


@needs_gradio
@pytest.mark.usefixtures("in_an_empty_folder")
def test_a_space_holds_all_that_its_page_needs(pipeline, capsys):
    printed = run(capsys, "demo", pipeline, "--space", "space")
    assert "hf upload USER/NAME space . --repo-type space" in printed
    readme = Path("space/README.md").read_text()
    assert readme.startswith("---\ntitle: ")
    assert {"sdk: gradio", "app_file: app.py", "license: mit"} <= set(readme.splitlines())
    needed = Path("space/requirements.txt").read_text()
    assert "torch>=" in needed
    assert "extra" not in needed
    # The page loads the package and the model of its own folder.
    code = """
import sys, looc_ldm.demo.page
print(looc_ldm.__file__)
looc_ldm.demo.page.launch = lambda models: [looc_ldm.demo.page.load_pipeline(name) for name in models] and sys.exit(7)
import app
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd="space", capture_output=True, text=True)
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout.strip() == str(Path("space/looc_ldm/__init__.py").resolve())
    assert "--space must name a new or empty folder" in refusal(capsys, "demo", "--space", "space")


@needs_gradio
@pytest.mark.usefixtures("in_an_empty_folder")
def test_what_is_no_pipeline_is_refused_before_the_page_starts(capsys):
    assert "no pipeline 'nowhere'" in refusal(capsys, "demo", "nowhere")
    assert "no pipeline 'nowhere'" in refusal(capsys, "demo", "nowhere", "--space", "space")


@pytest.mark.usefixtures("in_an_empty_folder")
def test_without_gradio_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert 'pip install "looc-ldm[demo]"' in refusal(capsys, "demo")


@needs_gradio
@pytest.mark.usefixtures("in_an_empty_folder")
def test_an_address_that_cannot_be_served_on_is_refused(capsys, address):
    port = address.rstrip("/").rpartition(":")[2]
    assert f"--port {port}: Address already in use" in refusal(capsys, "demo", "--port", port)
    assert "cannot serve on --host 256.1.1.1, --port any" in refusal(capsys, "demo", "--host", "256.1.1.1")
    assert "must be >0 and <65536, got 65536" in refusal(capsys, "demo", "--port", "65536")
