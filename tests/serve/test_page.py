"""The page in a real browser, driven over its debugging protocol: drop a picture, move the slider, zoom,
download, check the pixels.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from pipelines.bulk.nearest import Nearest
from resshift.config import Sampling
from resshift.images.animation import Frames
from serve.encode import PNG, Encoded, Encoding, encode_result, encode_steps
from tests.faces import GREY, grey_model, photo_with, write_detector
from tests.pictures import decoded, encoded, enlarged, file_of
from tests.servers import serving

WAIT_S = 120
DROP = """
(async () => {
  const carried = new DataTransfer();
  for (const [name, data] of %s) {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    carried.items.add(new File([bytes], name, { type: "image/png" }));
  }
  document.querySelector("#drop").dispatchEvent(
    new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
})()
"""
# The pixel of a canvas, as it is in its memory.
PIXEL = "[...document.querySelector('%s').getContext('2d').getImageData(%d, %d, 1, 1).data].slice(0, 3)"


class Browser:
    """A tab."""

    def __init__(self, channel: ClientConnection) -> None:
        self._channel, self._last = channel, 0
        self.complaints: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        self._channel.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self._channel.recv(WAIT_S))
            if message.get("id") == self._last:
                assert "error" not in message, message
                return message["result"]
            is_error = (
                message.get("params", {}).get("entry", {}).get("level") == "error"
            )  # a policy that was broken, a file that is missing
            if is_error or message.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(message["params"])[:600])

    def run(self, script: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < deadline, (
                f"{condition} did not come true: {self.run('document.body.innerText')}"
            )
            time.sleep(0.05)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=CODES.get(key, 0),
                **text,
            )

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


CODES = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40, "Tab": 9}


@pytest.fixture(scope="module")
def endpoint(start_endpoint: Callable[..., Any]) -> Any:
    return start_endpoint()


@pytest.fixture(scope="module")
def address(endpoint: Any) -> Iterator[str]:
    with served(endpoint.app) as found:
        yield found


@contextlib.contextmanager
def served(app: Any) -> Generator[str]:
    with serving(app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own."""
    command = shutil.which("chromium") or shutil.which("chromium-browser")
    if command is None:
        pytest.skip("chromium is not installed")
    profile = tmp_path / "profile"
    quiet = (
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-gpu",
    )
    where = (
        f"--user-data-dir={profile}",
        "--remote-debugging-port=0",
        "--window-size=1280,900",
        "about:blank",
    )
    with (tmp_path / "chromium.log").open("w") as log:
        running = subprocess.Popen(
            [command, "--headless=new", "--no-sandbox", *quiet, *where], stdout=log, stderr=log
        )
        try:
            with connect(debugger(profile, running), max_size=None, open_timeout=WAIT_S) as channel:
                yield Browser(channel)
        finally:
            running.kill()
            running.wait(30)


def debugger(profile: Path, running: subprocess.Popen[bytes]) -> str:
    """Return the address of the tab."""
    deadline = time.monotonic() + WAIT_S
    port = profile / "DevToolsActivePort"
    while time.monotonic() < deadline:
        assert running.poll() is None, "chromium ended"
        with contextlib.suppress(OSError, IndexError, ValueError):
            number = int(port.read_text().splitlines()[0])
            import httpx2

            found = [
                tab
                for tab in httpx2.get(f"http://127.0.0.1:{number}/json", timeout=30).json()
                if tab["type"] == "page"
            ]
            return found[0]["webSocketDebuggerUrl"]
        time.sleep(0.1)
    raise TimeoutError("chromium did not come up")


def open_page(browser: Browser, address: str, downloads: Path, width: int = 1280, height: int = 900) -> None:
    for domain in ("Page", "Runtime", "Log"):
        browser.call(f"{domain}.enable")
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=width < 600,
    )
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    browser.call("Page.navigate", url=address)
    browser.wait("document.readyState === 'complete' && document.querySelector('#model')?.options.length")


def drop(browser: Browser, data: bytes, name: str = "bridge.png", *others: tuple[str, bytes]) -> None:
    files = [(name, base64.b64encode(data).decode()) for name, data in ((name, data), *others)]
    browser.run(DROP % json.dumps(files))


def saved(path: Path) -> bytes:
    """Wait for a download and return it."""
    deadline = time.monotonic() + WAIT_S
    # Chromium holds the name with an empty file, and renames the whole one to it.
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < deadline, list(path.parent.iterdir())
        time.sleep(0.1)
    data = path.read_bytes()
    path.unlink()
    return data


async def grey(
    frames: Frames, sampling: Sampling = Sampling(), encoding: Encoding = PNG, has_steps: bool = False
) -> Encoded:
    """Fill holes with a grey."""
    (picture,) = frames.pictures
    assert picture.mask is not None
    pixels = np.where(picture.mask[..., None], np.uint8(77), picture.pixels)
    return encode_result(replace(picture, pixels=pixels, mask=None), encoding)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hole_is_painted_and_filled(
    browser: Browser, start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    made = start_endpoint()
    made.model.facts = replace(made.model.facts, scale=1, has_one_scale=False, fills_holes=True)
    made.model.upscale = grey
    with served(made.app) as address:
        open_page(browser, address, tmp_path)
        data = encoded(11, 60, 80)
        drop(browser, data)
        browser.wait("!document.querySelector('#hole').hidden")
        browser.run("document.querySelector('#again').click()")
        browser.wait("document.querySelector('#error').textContent === 'Paint the hole first.'")
        box = "document.querySelector('#hole-layer').getBoundingClientRect()"
        left, top, width, height = (
            browser.run(f"{box}.{side}") for side in ("left", "top", "width", "height")
        )
        browser.drag((left + 0.2 * width, top + 0.5 * height), (left + 0.8 * width, top + 0.5 * height))
        browser.run("document.querySelector('#again').click()")
        browser.wait("document.querySelector('#result').dataset.done === '1'")
        expected = decoded(data)
        for x, y in ((40, 30), (20, 30), (60, 31)):
            assert browser.run(PIXEL % ("#after", x, y)) == [77, 77, 77]
        for x, y in ((5, 5), (40, 10), (40, 50), (75, 30)):
            assert browser.run(PIXEL % ("#after", x, y)) == expected[y, x].tolist()
        browser.screenshot(tmp_path / "hole.png")
        assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_faces_can_be_asked_for_where_the_model_restores_them(
    browser: Browser, start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    made, model = start_endpoint(faces=write_detector(tmp_path / "cells.onnx")), grey_model()

    async def restore(
        frames: Frames, sampling: Sampling = Sampling(), encoding: Encoding = PNG, has_steps: bool = False
    ) -> Encoded:
        return encode_result(model.upscale(frames.pictures[0], sampling), encoding)

    made.model.facts = replace(made.model.facts, scale=1, has_one_scale=False, takes_faces=True)
    made.model.upscale = restore
    photo = photo_with([(40, 56)], 100, 160)
    with served(made.app) as address:
        open_page(browser, address, tmp_path)
        browser.wait("!document.querySelector('#faces-field').hidden")
        browser.run("document.querySelector('#faces').value = 'true'")
        drop(browser, file_of(photo))
        browser.wait("document.querySelector('#result').dataset.done === '1'")
        assert browser.run(PIXEL % ("#after", 60, 44)) == [GREY] * 3
        assert browser.run(PIXEL % ("#after", 150, 44)) == photo[44, 150].tolist()
        browser.wait("document.body.textContent.includes('1 face restored')")
        browser.screenshot(tmp_path / "faces.png")
        assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_drop_compare_and_download(browser: Browser, address: str, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    open_page(browser, address, downloads)
    data = encoded(11, 60, 80)
    drop(browser, data)
    browser.wait("document.querySelector('#result').dataset.done === '1'")
    expected = enlarged(data)
    # What is on the two canvases: ours, pixel by pixel, and bicubic, as Pillow has it.
    assert browser.run(PIXEL % ("#after", 101, 77)) == expected[77, 101].tolist()
    bicubic = bicubic_pixels(decoded(data), 320, 240)
    assert (
        np.abs(np.subtract(browser.run(PIXEL % ("#before", 101, 77)), bicubic[77, 101], dtype=int)).max() <= 1
    )
    # The divider follows the range, by keyboard and by pointer.
    browser.run("document.querySelector('#split').focus()")
    clip = "document.querySelector('#before-layer').style.clipPath"
    start = browser.run(clip)
    for _ in range(20):
        browser.press("ArrowRight")
    assert browser.run("Number(document.querySelector('#split').value)") == pytest.approx(52)
    assert browser.run(clip) != start
    box = browser.run("document.querySelector('#view').getBoundingClientRect().toJSON()")
    middle = box["y"] + box["height"] / 2
    browser.drag((box["x"] + box["width"] / 2, middle), (box["x"] + box["width"] / 4, middle))
    assert browser.run("Number(document.querySelector('#split').value)") == pytest.approx(25, abs=0.5)
    assert "75%" in browser.run(clip)
    # Zoom and pan by keyboard, and back.
    browser.run("document.querySelector('#view').focus()")
    place = "document.querySelector('#after').style.transform"
    fitted = browser.run(place)
    for key in "+++":
        browser.press(key)
    zoomed = browser.run(place)
    assert scale_of(zoomed) == pytest.approx(scale_of(fitted) * 1.25**3)
    browser.press("ArrowLeft")
    assert browser.run(place) != zoomed
    browser.press("0")
    assert browser.run(place) == fitted
    # Pixels in the place of bicubic.
    browser.run("document.querySelector('[name=against][value=pixels]').click()")
    browser.wait("document.querySelector('#tag-before').textContent === 'pixels'")
    assert browser.run(PIXEL % ("#before", 25, 19)) == decoded(data)[19, 25].tolist()
    # The download is the file that the server made.
    browser.run("document.querySelector('#download').click()")
    assert np.array_equal(decoded(saved(downloads / "bridge_x4.png")), expected)
    assert "80 × 60 → 320 × 240" in browser.run("document.querySelector('#facts').innerText")
    assert browser.complaints == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_several_files_are_one_archive(browser: Browser, address: str, tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    open_page(browser, address, downloads)
    first, second = encoded(11, 60, 80), encoded(12, 20, 24)
    drop(browser, first, "größe.png", ("notes.txt", b"no picture at all"), ("größe.png", second))
    browser.wait("document.querySelector('#error').textContent.startsWith('1 of 3 failed: notes.txt')")
    states = "[...document.querySelector('#list').children].map((row) => row.dataset.state)"
    assert browser.run(states) == ["done", "failed", "done"]
    assert browser.run(PIXEL % ("#after", 101, 77)) == enlarged(first)[77, 101].tolist()
    browser.run("document.querySelector('#list').lastElementChild.querySelector('button').click()")
    browser.wait("document.querySelector('#result').dataset.done === '2'")
    assert browser.run(PIXEL % ("#after", 41, 33)) == enlarged(second)[33, 41].tolist()
    browser.run("document.querySelector('#all').click()")
    with zipfile.ZipFile(io.BytesIO(saved(downloads / "pictures.zip"))) as archive:
        assert archive.testzip() is None  # checks the sums
        assert archive.namelist() == ["größe_x4.png", "größe_x4 (2).png"]
        for name, data in zip(archive.namelist(), (first, second), strict=True):
            assert np.array_equal(decoded(archive.read(name)), enlarged(data))
    browser.screenshot(tmp_path / "files.png")
    (refused,) = browser.complaints  # the browser says it of every 415
    assert "415" in refused


class Sliding:
    """A chain whose picture has every pixel four times and whose other end is the negative of that."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int, int | None]] = []

    async def upscale(
        self,
        frames: Frames,
        sampling: Sampling = Sampling(),
        encoding: Encoding = PNG,
        has_steps: bool = False,
    ) -> Encoded:
        picture = Nearest().upscale(frames.pictures[0])
        x0, y0, share = picture.pixels.astype(float), 255.0 - picture.pixels, sampling.fidelity or 0
        mixed = replace(picture, pixels=np.rint(x0 + share * (y0 - x0)).astype(np.uint8))
        if frames.pictures[0].height > 8:  # no probe
            self.asked.append((share, sampling.seed, sampling.steps))
        if has_steps:
            earlier = [replace(picture, pixels=np.full_like(picture.pixels, 10 * i)) for i in (1, 2)]
            return encode_steps([*earlier, mixed], encoding)
        return encode_result(mixed, encoding)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_chain_has_steps_a_seed_and_a_slider(
    browser: Browser, start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    made, model = start_endpoint(), Sliding()
    made.model.facts = replace(made.model.facts, steps=4, has_estimate=True, draws_noise=True)
    made.model.upscale = model.upscale
    with served(made.app) as address:
        open_page(browser, address, downloads)
        browser.run("document.querySelector('#steps').value = '3'")
        browser.run("document.querySelector('#seed').value = '7'")
        data = encoded(11, 60, 80)
        drop(browser, data)
        browser.wait("document.querySelector('#result').dataset.done === '1'")
        one, other = enlarged(data), 255 - enlarged(data)
        assert model.asked == [(0, 7, 3)]

        def slide(share: str) -> list[int]:
            browser.run(
                f"document.querySelector('#fidelity').value = '{share}';"
                "document.querySelector('#fidelity').dispatchEvent(new Event('input'))"
            )
            browser.wait(f"document.querySelector('#result').dataset.share === '{share}'")
            return browser.run(PIXEL % ("#after", 101, 77))

        def download() -> bytes:
            browser.run("document.querySelector('#download').click()")
            return saved(downloads / "bridge_x4.png")

        mixed = one[77, 101] + 0.35 * (other[77, 101].astype(float) - one[77, 101])
        assert np.abs(slide("0.35") - mixed).max() <= 0.5  # rounded, and mixed by the browser:
        assert model.asked[1:] == [(1, 7, 3)]
        assert slide("1") == other[77, 101].tolist()
        assert np.array_equal(decoded(download()), other)
        assert slide("0") == one[77, 101].tolist()
        assert np.array_equal(decoded(download()), one)
        assert len(model.asked) == 2
        slide("0.35")
        assert np.abs(decoded(download()) - (one + 0.35 * (other.astype(float) - one))).max() <= 0.5
        assert model.asked[2:] == [(0.35, 7, 3)]  # a file in between is the server's

        browser.run("document.querySelector('#show-steps').click()")
        browser.wait("document.querySelectorAll('#strip button').length === 3")
        for i, expected in ((0, [10] * 3), (1, [20] * 3), (2, one[77, 101].tolist())):
            browser.run(f"document.querySelector('#strip').children[{i}].click()")
            told = browser.run("document.querySelector('#tag-after').textContent")
            assert (told, browser.run(PIXEL % ("#after", 101, 77))) == (f"step {i + 1} of 3", expected)
        browser.run("document.querySelector('#save-steps').click()")
        with zipfile.ZipFile(io.BytesIO(saved(downloads / "bridge_x4_steps.zip"))) as archive:
            assert np.array_equal(decoded(archive.read("step_3.png")), one)
        browser.screenshot(tmp_path / "steps.png")
        assert browser.complaints == []


def bicubic_pixels(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def scale_of(transform: str) -> float:
    return float(transform.split("scale(")[1].rstrip(")"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_errors_are_told_and_a_phone_is_wide_enough(browser: Browser, address: str, tmp_path: Path) -> None:
    open_page(browser, address, tmp_path, 390, 844)
    drop(browser, b"no picture at all", "notes.txt")
    browser.wait("!document.querySelector('#error').hidden")
    assert "none of the accepted types" in browser.run("document.querySelector('#error').textContent")
    drop(browser, encoded(12, 20, 24))
    browser.wait("document.querySelector('#result').dataset.done === '1'")
    assert browser.run("document.querySelector('#error').hidden")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    # Everything that can be used has a name for a screen reader.
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "textbox", "slider", "combobox", "radio", "spinbutton"}
    nameless = [
        node
        for node in tree
        if node.get("role", {}).get("value") in roles and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    assert len([node for node in tree if node.get("role", {}).get("value") in roles]) > 8
    browser.call("Page.navigate", url=f"{address}/docs")
    browser.wait("document.querySelectorAll('article').length > 8")


def wait_for_cancelled_jobs(browser: Browser, address: str, number: int) -> None:
    deadline = time.monotonic() + WAIT_S
    told = f"fetch('{address}/v1/jobs').then((answer) => answer.json()).then(({{ jobs }}) => jobs)"
    while [job["state"] for job in browser.run(told)] != ["cancelled"] * number:
        assert time.monotonic() < deadline, browser.run(told)
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_long_picture_is_a_job_and_can_be_cancelled(
    browser: Browser, address: str, endpoint: Any, tmp_path: Path
) -> None:
    """It is not held by one request, which would end at the deadline, and Cancel ends it at the server."""
    open_page(browser, address, tmp_path)
    data = encoded(13, 500, 600)
    endpoint.model.is_held = True
    try:
        browser.run(
            "window.text = Blob.prototype.text; Blob.prototype.text = async function () {"
            "await new Promise((go) => { window.go = go; }); return window.text.call(this); }; true"
        )
        drop(browser, data)
        browser.wait("window.go")  # the answer that names the job is there, and not read yet
        browser.run("document.querySelector('#cancel').click()")
        browser.run("Blob.prototype.text = window.text; window.go()")
        wait_for_cancelled_jobs(browser, address, 1)
        drop(browser, data)
        browser.wait(
            "!document.querySelector('#progress').hidden && "
            "document.querySelector('#stage').textContent === 'Upscaling'"
        )
        browser.run("document.querySelector('#cancel').click()")
        assert browser.run("document.querySelector('#error').textContent") == "Cancelled."
        assert browser.run("document.querySelector('#error').className") == "error asked"  # grey, not red
        assert browser.run("document.querySelector('#progress').hidden")
        wait_for_cancelled_jobs(browser, address, 2)
    finally:
        endpoint.model.is_held = False
    drop(browser, data)
    browser.wait("document.querySelector('#result').dataset.done === '1'")
    assert browser.run(PIXEL % ("#after", 101, 77)) == enlarged(data)[77, 101].tolist()
    assert "600 × 500 → 2400 × 2000" in browser.run("document.querySelector('#facts').innerText")
    assert browser.run("document.querySelector('#download').download") == "bridge_x4.png"
    browser.screenshot(tmp_path / "long.png")
    assert browser.complaints == []
