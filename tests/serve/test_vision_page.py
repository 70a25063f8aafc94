"""The page of the vision server in a real browser: a dropped image is classified by both networks, side by side."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import uvicorn
from browser_support import CHROMIUM, Browser
from PIL import Image
from safetensors.torch import save_file

from qtoolkit.serve import vision_app
from qtoolkit.serve.address import choose_port
from qtoolkit.vision import data, models, runtime
from qtoolkit.vision.pipeline import compress
from qtoolkit.vision.runtime import Loaded

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
SETTLED = """new Promise(done => {
    const look = () => document.getElementById('said').textContent.length > 1 ? done() : setTimeout(look, 50);
    look(); })"""  # while it waits the page says one character
PANELS = """[...document.querySelectorAll('section')].map(s => ({
    model: s.dataset.model, about: s.querySelector('.about').textContent, time: s.querySelector('.time').textContent,
    rows: [...s.querySelectorAll('tr')].map(r => [...r.cells].map(c => c.textContent)) }))"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, torch.nn.Module]:
    place = tmp_path_factory.mktemp("page")
    save_file(dict(models.resolve("digits").network.state_dict()), place / "w.safetensors")
    compress("digits", "nm", place / "out", weights=place / "w.safetensors", test="digits-test")
    loaded = runtime.load(place / "out")
    return loaded, loaded.made_from(str(place / "w.safetensors"))


@pytest.fixture(scope="module")
def address(made: tuple[Loaded, torch.nn.Module]) -> Iterator[str]:
    port = choose_port("127.0.0.1", 0)
    app = vision_app.build_app("digits <b>", *made)  # a folder may be called anything
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(30)


@pytest.fixture
def browser(address: str, tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as found:
        found.open(address)
        yield found


def drop(browser: Browser, name: str, content: bytes) -> None:
    """Let go of a file over the page, as a person does."""
    coded = base64.b64encode(content).decode()
    browser.run(f"""fetch('data:image/png;base64,{coded}').then(r => r.arrayBuffer()).then(bytes => {{
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([bytes], '{name}', {{ type: 'image/png' }}));
        document.getElementById('drop').dispatchEvent(new DragEvent('drop', {{ dataTransfer, cancelable: true }}));
    }})""")
    browser.run(SETTLED)


def digit() -> tuple[torch.Tensor, bytes]:
    pixels = data.load("digits-test", models.table()["digits"]).x[:1]
    file = io.BytesIO()
    Image.fromarray(pixels[0, 0].numpy()).save(file, "png")
    return pixels, file.getvalue()


def test_a_dropped_image_gets_classes_and_latency_of_both_networks(
    browser: Browser, made: tuple[Loaded, torch.nn.Module]
) -> None:
    loaded, reference = made
    pixels, file = digit()
    drop(browser, "zero.png", file)
    assert browser.run("document.getElementById('said').textContent") == "zero.png"
    panels = browser.run(PANELS)
    assert [panel["model"] for panel in panels] == ["digits <b>", "digits <b>-float"]
    assert [panel["about"].split(",")[0] for panel in panels] == ["2:4", "float"]
    x = data.normalise(pixels, loaded.architecture)
    for panel, network in zip(panels, (loaded.network, reference), strict=True):
        with torch.inference_mode():
            best = network(x).softmax(dim=1)[0].topk(5)
        assert [row[0] for row in panel["rows"]] == [f"class {index}" for index in best.indices.tolist()]
        assert [float(row[2].split()[0]) for row in panel["rows"]] == pytest.approx(
            (100 * best.values).tolist(), abs=0.1
        )
        assert float(panel["time"].split()[0]) > 0
    assert browser.picture().startswith(b"\x89PNG")


def test_what_is_no_image_is_told_on_the_page_and_the_next_image_works(browser: Browser) -> None:
    drop(browser, "broken.png", b"no image at all")
    assert "not" in browser.run("document.getElementById('said').textContent")
    assert all(not panel["rows"] for panel in browser.run(PANELS))
    drop(browser, "again.png", digit()[1])
    assert all(len(panel["rows"]) == 5 for panel in browser.run(PANELS))
