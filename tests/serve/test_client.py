"""The client against a real server on loopback, by known answer, and against one that answers as told."""

from __future__ import annotations

import http.server
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resshift import client as module
from resshift.client import Client, EndpointError
from serve.http.keys import digest, new_key
from tests.pictures import decoded, encoded, enlarged, file_of
from tests.serve.test_masks import FILLED, HOLE, MASK, PIXELS, fill
from tests.servers import serving

KEY = new_key()


@pytest.fixture(scope="module")
def endpoint(start_endpoint: Callable[..., Any]) -> Any:
    return start_endpoint(keys=[{"name": "alice", "sha256": digest(KEY)}])


@pytest.fixture(scope="module")
def address(endpoint: Any) -> Iterator[str]:
    with serving(endpoint.app) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def upscale(address: str) -> Client:
    return Client(address + "/", KEY)


def states(client: Client) -> list[bytes]:
    """Return how the jobs stand that the server has."""
    answer, _ = client._asked("GET", "/v1/jobs", time.monotonic() + 60)  # pyright: ignore[reportPrivateUsage]
    return re.findall(rb'"state":\s*"(\w+)"', answer)


def test_a_picture_gives_a_picture_and_a_file_a_file(upscale: Client) -> None:
    data = encoded(0, 20, 24)
    image = upscale(Image.fromarray(decoded(data)), seed=5)
    assert np.array_equal(np.asarray(image), enlarged(data))
    assert np.array_equal(decoded(upscale(data, cascade=False, model=None)), enlarged(data))
    assert upscale(data, format="jpeg")[:3] == b"\xff\xd8\xff"
    assert upscale.models()[0]["name"] == "nearest-x4"


def test_a_long_picture_is_a_job_that_leaves_nothing(
    upscale: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONG_PIXELS", 100)
    monkeypatch.setattr(module, "_LOOK_S", (0.01, 0.05))
    data = encoded(1, 20, 24)
    assert np.array_equal(decoded(upscale(data)), enlarged(data))
    assert states(upscale) == []


def test_a_client_that_stops_cancels_its_job(
    upscale: Client, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "LONG_PIXELS", 100)
    monkeypatch.setattr(module, "sleep", interrupted)
    endpoint.model.is_held = True
    try:
        with pytest.raises(KeyboardInterrupt):
            upscale(encoded(2, 20, 24))
        assert states(upscale) == [b"cancelled"]
    finally:
        endpoint.model.is_held = False
    with pytest.raises(TimeoutError, match=r"not done within 0\.1 s"):
        Client(upscale.url, KEY, timeout_s=0.1)(encoded(2, 20, 24))


def test_a_refusal_is_the_line_of_the_server(upscale: Client, address: str) -> None:
    with pytest.raises(
        EndpointError, match="colour: there is no such option; allowed: cascade, faces, fidelity"
    ) as told:
        upscale(encoded(), colour="red")
    assert (told.value.status, told.value.problem["type"]) == (422, "/problems/bad_option")
    with pytest.raises(EndpointError, match="none of the accepted types"):
        upscale(b"no picture")
    with pytest.raises(EndpointError, match="An API key is needed"):
        Client(address)(encoded())
    with pytest.raises(ValueError, match="must begin with http"):
        Client("photos.example.org")
    with pytest.raises(ValueError, match="ZIP"):
        upscale(Image.new("RGB", (4, 4)), trajectory=True)


@pytest.mark.slow
def test_a_mask_goes_with_the_picture(start_endpoint: Callable[..., Any]) -> None:
    filling = start_endpoint()
    filling.model.facts = replace(filling.model.facts, scale=1, has_one_scale=False, fills_holes=True)
    filling.model.upscale = fill
    with serving(filling.app) as port:
        client = Client(f"http://127.0.0.1:{port}")
        image, hole = (Image.fromarray(pixels) for pixels in (PIXELS, np.uint8(255) * HOLE))
        assert np.array_equal(np.asarray(client(image, mask=hole)), FILLED)
        assert np.array_equal(decoded(client(file_of(PIXELS), mask=MASK)), FILLED)


def test_a_busy_server_is_asked_again_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked, slept = [(503, "7"), (429, "2"), (302, ""), (200, "")], list[Any](), list[float]()

    class Told(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, wait = answers.pop(0)
            asked.append(
                (self.headers["Idempotency-Key"], self.rfile.read(int(self.headers["Content-Length"])))
            )
            self.send_response(status)
            if wait:
                self.send_header("Retry-After", wait)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/")
            self.send_header("Content-Length", "0" if status != 200 else "4")
            self.end_headers()
            if status == 200:
                self.wfile.write(b"made")

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Told)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "sleep", slept.append)
    try:
        client = Client(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(EndpointError, match="302"):  # a key is for one server
            client(encoded())
        assert slept == [7, 2]
        assert client(encoded()) == b"made"
        assert {body for _, body in asked} == {encoded()}
        assert len({key for key, _ in asked}) == 2  # one for each call
        answers.append((503, "7"))
        with pytest.raises(TimeoutError, match="no answer within 5 s"):
            Client(f"http://127.0.0.1:{server.server_port}", timeout_s=5)(encoded())
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(EndpointError, match="cannot be reached"):
        client(encoded())


@pytest.mark.slow
def test_the_example_of_the_docs_runs(start_endpoint: Callable[..., Any], tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None
    data = encoded(8, 20, 24)
    (tmp_path / "photo.png").write_bytes(data)
    with serving(start_endpoint().app) as port:
        script = example[1].replace("http://127.0.0.1:8000", f"http://127.0.0.1:{port}")
        light = script + "\nassert not {'torch', 'ray', 'numpy'} & set(sys.modules)\n"
        (tmp_path / "client.py").write_text(light, encoding="utf-8")
        command = [sys.executable, "client.py", "photo.png", "big.png"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    assert np.array_equal(decoded((tmp_path / "big.png").read_bytes()), enlarged(data))
