"""The endpoint over HTTP, by known answer: pixels, statuses, headers. The model is in this process;
`test_serve.py` has the real thing.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from resshift import images
from resshift.images.profiles import PRIMARIES, colorants, matrix_profile
from serve import encode
from serve.app import Answering
from serve.http.access import AccessLog
from serve.http.body import Reader
from serve.http.keys import digest, new_key
from serve.http.limits import ByteBudget
from serve.http.metrics import Metrics
from serve.http.problems import KINDS, Problem
from serve.models import Readiness
from serve.settings import LimitSettings
from tests.pictures import decoded, encoded, enlarged, noise


def bomb(width: int = 65_000, height: int = 65_000) -> bytes:
    """Return a PNG of a few hundred bytes whose header promises billions of pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


class TestPicture:
    def test_raw_body_gives_the_known_pixels(self, endpoint: Any) -> None:
        data = encoded(0, 20, 24)
        answer = endpoint.post(data)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "image/png"
        assert np.array_equal(decoded(answer.content), enlarged(data))
        phases = [part.split(";dur=") for part in answer.headers["server-timing"].split(", ")]
        assert [name for name, _ in phases] == ["queue", "decode", "model", "encode"]
        assert all(float(ms) >= 0 for _, ms in phases)
        assert (answer.headers["x-picture-size"], answer.headers["x-result-size"]) == ("24x20", "96x80")
        assert (answer.headers["x-model"], answer.headers["x-model-identity"]) == ("nearest-x4", "nearest-x4")
        assert answer.headers["x-content-type-options"] == "nosniff"

    def test_multipart_with_options_in_fields(self, endpoint: Any) -> None:
        data = encoded(1, 20, 24)
        form = {"files": {"image": ("größe.png", data, "image/png")}, "data": {"format": "tiff", "seed": "5"}}
        answer = endpoint.client.post("/v1/upscale?format=jpeg", **form)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "image/tiff"  # a field wins over the query
        assert np.array_equal(decoded(answer.content), enlarged(data))
        assert answer.headers["content-disposition"] == "inline; filename*=UTF-8''gr%C3%B6%C3%9Fe_x4.tiff"

    def test_options_as_a_json_field(self, endpoint: Any) -> None:
        form = {
            "files": {"image": encoded(0, 20, 24)},
            "data": {"options": json.dumps({"format": "webp", "quality": 40})},
        }
        assert endpoint.client.post("/v1/upscale", **form).headers["content-type"] == "image/webp"

    @pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "TIFF", "WEBP"])
    def test_formats_are_told_by_content(self, format: str, endpoint: Any) -> None:
        data = encoded(2, 20, 24, format=format, **({"lossless": True} if format == "WEBP" else {}))
        answer = endpoint.post(data, headers={"Content-Type": "text/plain"})
        assert answer.status_code == 200, answer.text
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB")).repeat(4, axis=0).repeat(4, axis=1)
        assert np.array_equal(decoded(answer.content), expected)

    def test_one_pixel(self, endpoint: Any) -> None:
        data = encoded(3, 1, 1)
        answer = endpoint.post(data)
        assert np.array_equal(decoded(answer.content), enlarged(data))

    def test_accept_chooses_the_type(self, endpoint: Any) -> None:
        answer = endpoint.post(encoded(0, 20, 24), headers={"Accept": "image/jpeg"})
        assert Image.open(io.BytesIO(answer.content)).format == "JPEG"
        assert endpoint.post(encoded(0, 20, 24), headers={"Accept": "application/json"}).status_code == 406

    def test_metadata_is_kept_or_stripped(self, endpoint: Any) -> None:
        exif = Image.Exif()
        exif[0x010E] = "a bridge"  # ImageDescription
        data = encoded(4, 20, 24, format="JPEG", exif=exif)
        kept = Image.open(io.BytesIO(endpoint.post(data, "/v1/upscale?format=jpeg").content))
        bare = Image.open(io.BytesIO(endpoint.post(data, "/v1/upscale?format=jpeg&metadata=strip").content))
        assert kept.getexif().get(0x010E) == "a bridge"
        assert not bare.getexif()

    def test_wide_colours_keep_their_profile_and_srgb_needs_none(self, endpoint: Any) -> None:
        wide = matrix_profile(colorants(PRIMARIES[12]), None, "Display P3")
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for icc, expected in ((wide, wide), (srgb, None)):
            data = encoded(4, 20, 24, icc_profile=icc)
            answer = endpoint.post(data, "/v1/upscale?metadata=strip")
            assert Image.open(io.BytesIO(answer.content)).info.get("icc_profile") == expected
            assert np.array_equal(decoded(answer.content), enlarged(data))


PNG = b"\x89PNG\r\n\x1a\n"


class TestTrajectory:
    @pytest.fixture(scope="class")
    def chain(self, start_endpoint: Callable[..., Any]) -> Iterator[Any]:
        made = start_endpoint(limits={"output_megapixels": 0.03})  # three pictures of 96 x 80, and not four
        made.model.facts = replace(made.model.facts, steps=4, draws_noise=True)
        with made.client:
            yield made

    def test_an_archive_has_what_each_step_predicts_and_the_result_last(self, chain: Any) -> None:
        data = encoded(0, 20, 24)
        asked = "/v1/upscale?trajectory=true&steps=3"
        answer = chain.post(data, asked, headers={"Accept": "application/zip"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip"), answer.text
        assert answer.headers["content-disposition"].endswith("picture_x4_steps.zip")
        assert answer.headers["x-result-size"] == "96x80"
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.testzip() is None
            assert archive.namelist() == ["step_1.png", "step_2.png", "step_3.png"]
            negative = 255 - enlarged(data)
            for name, expected in zip(archive.namelist(), (negative, negative, enlarged(data)), strict=True):
                assert np.array_equal(decoded(archive.read(name)), expected)
            assert archive.read("step_3.png") == chain.post(data).content
        assert chain.post(data, asked).content == answer.content
        assert chain.client.get("/v1/models").json()["models"][0]["seed"] is True

    def test_all_of_its_pictures_count(self, chain: Any, endpoint: Any) -> None:
        told = [
            chain.post(encoded(0, 20, 24), "/v1/upscale?trajectory=true"),
            chain.post(encoded(0, 20, 24), "/v1/upscale?trajectory=true&steps=3&cascade=true"),
            endpoint.post(encoded(0, 20, 24), "/v1/upscale?trajectory=true"),
        ]
        assert [answer.status_code for answer in told] == [413, 422, 422]
        assert "4 times 96x80" in told[0].json()["detail"]
        assert told[1].json()["detail"] == "trajectory must be false with cascade"
        assert "for nearest-x4, which has one step" in told[2].json()["detail"]


class TestRefusals:
    @pytest.mark.parametrize("format", ["avif", "jxl"])
    def test_headers_of_libraries_are_read_in_a_process(
        self, format: Any, endpoint: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = images.encode(images.Picture(pixels=noise(0, 20, 24)), format, 100)
        monkeypatch.setattr(images, "probe", lambda *_: pytest.fail("the gateway read it"))
        answer = endpoint.post(data)
        assert (answer.status_code, answer.headers["x-result-size"]) == (200, "96x80")
        for damaged in (data[:40], data[:20] + bytes(50)):
            assert endpoint.post(damaged).status_code == 422

    @pytest.mark.parametrize(
        "path",
        ["/healthz", "/readyz", "/metrics", "/v1/models", "/v1/jobs", "/v1/jobs/none", "/problems/auth", "/"],
    )
    def test_what_answers_get_answers_head_without_a_body(self, endpoint: Any, path: str) -> None:
        answer = endpoint.client.head(path)
        assert (answer.status_code, answer.content) == (endpoint.client.get(path).status_code, b"")

    def test_a_result_that_its_format_cannot_hold_is_refused_before_the_work(self, endpoint: Any) -> None:
        answer = endpoint.post(encoded(0, 1, 5000), "/v1/upscale?format=webp")
        assert (answer.status_code, answer.json()["reason"]) == (413, "too_large")
        assert "webp holds at most 16383 px a side" in answer.json()["detail"]

    def test_whatever_an_encoder_raises_is_no_mistake_of_the_server(
        self, endpoint: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def encode_frames(*arguments: Any) -> bytes:
            raise RuntimeError("ERROR adding frame")

        monkeypatch.setattr(encode, "encode_frames", encode_frames)
        answer = endpoint.post(encoded())
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/unwritable")
        assert answer.json()["reason"] == "encode_error"
        assert (
            "the result cannot be written as png: RuntimeError: ERROR adding frame" in answer.json()["detail"]
        )

    @pytest.mark.parametrize(
        ("data", "status", "reason"),
        [
            (b"", 400, None),
            (b"hello", 415, "not_an_image"),
            (b"%PDF-1.7 ...", 415, "not_an_image"),
            (b"8BPS\0\1......", 415, "unsupported_format"),
            (PNG, 422, None),
            (bomb(), 413, "too_large"),
            (
                b"BM"
                + struct.pack("<IIIIiiHHIIiiII", 200, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
                + bytes(99),
                413,
                "too_large",
            ),
            (bytes(2_000_001), 413, "too_large"),
        ],
    )
    def test_bad_pictures(self, data: bytes, status: int, reason: str | None, endpoint: Any) -> None:
        begun = endpoint.model.num_begun
        answer = endpoint.post(data)
        body = answer.json()
        assert (answer.status_code, answer.headers["content-type"], body["status"]) == (
            status,
            "application/problem+json",
            status,
        )
        assert reason is None or body["reason"] == reason
        assert endpoint.client.get(body["type"]).json()["status"] == status  # the type can be opened
        assert endpoint.model.num_begun == begun

    def test_a_truncated_picture(self, endpoint: Any) -> None:
        answer = endpoint.post(encoded(0, 100, 100)[:4000])
        assert (answer.status_code, answer.json()["reason"]) == (422, "truncated")

    def test_a_result_that_would_be_too_large(self, start_endpoint: Callable[..., Any]) -> None:
        answer = start_endpoint(limits={"output_megapixels": 0.007}).post(
            encoded(0, 20, 24)
        )  # 96 x 80 = 7680
        assert answer.status_code == 413
        assert "96x80" in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("query", "option"),
        [
            ("step=4", "step"),
            ("url=http://169.254.169.254/", "url"),  # the endpoint fetches nothing
            ("format=bmp", "format"),
            ("quality=0", "quality"),
            ("quality=101", "quality"),
            ("seed=-1", "seed"),
            ("seed=1.5", "seed"),
            ("outscale=0", "outscale"),
            ("outscale=nan", "outscale"),
            ("outscale=17", "outscale"),
            ("steps=0", "steps"),
            ("metadata=some", "metadata"),
        ],
    )
    def test_bad_options_are_named(self, query: str, option: str, endpoint: Any) -> None:
        answer = endpoint.post(encoded(0, 20, 24), f"/v1/upscale?{query}")
        assert answer.status_code == 422
        assert [one["option"].removeprefix("query.") for one in answer.json()["errors"]] == [option]
        form = {"files": {"image": encoded(0, 20, 24)}, "data": dict([query.split("=", 1)])}
        assert endpoint.client.post("/v1/upscale", **form).status_code == 422

    def test_an_unknown_option_is_named_with_what_is_allowed(self, endpoint: Any) -> None:
        told = "scale: there is no such option; allowed: "
        query = endpoint.post(encoded(0, 20, 24), "/v1/upscale?scale=2")
        form = {"files": {"image": encoded(0, 20, 24)}, "data": {"scale": "2"}}
        for answer in (query, endpoint.client.post("/v1/upscale", **form)):
            assert answer.status_code == 422
            assert answer.json()["detail"].removeprefix("query.").startswith(told)
            assert {"format", "outscale", "seed"} <= set(re.split(r"\W+", answer.json()["detail"]))
        body = endpoint.client.post("/v1/jobs", json={"source": "a", "target": "b", "scale": 2}).json()
        assert body["detail"].startswith("scale: there is no such option; allowed: ")

    @pytest.mark.parametrize("query", ["model=unknown", "outscale=2", "steps=2"])
    def test_what_the_model_cannot_do_is_refused_before_it_is_asked(self, query: str, endpoint: Any) -> None:
        answer = endpoint.post(encoded(0, 20, 24), f"/v1/upscale?{query}")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/bad_option")

    @pytest.mark.parametrize(
        ("content_type", "body", "status"),
        [
            ("multipart/form-data", b"--x\r\n", 400),
            ("multipart/form-data; boundary=x", b"no boundary here", 400),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\nab',
                400,
            ),
            (
                "multipart/form-data; boundary=x",
                b"--x\r\nContent-Disposition: form-data\r\n\r\nab\r\n--x--\r\n",
                400,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n--x--\r\n',
                400,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\nab\r\n--x--\r\n',
                400,
            ),
            (
                "multipart/form-data; boundary=x",
                b'--x\r\nContent-Disposition: form-data; name="options"\r\n\r\n[1]\r\n--x--\r\n',
                422,
            ),
        ],
    )
    def test_bad_multipart(self, content_type: str, body: bytes, status: int, endpoint: Any) -> None:
        answer = endpoint.post(body, headers={"Content-Type": content_type})
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")

    def test_compressed_bodies_are_refused(self, endpoint: Any) -> None:
        assert endpoint.post(encoded(0, 20, 24), headers={"Content-Encoding": "gzip"}).status_code == 415

    def test_a_body_in_pieces_is_counted_as_it_arrives(self, endpoint: Any) -> None:
        sent = 0

        def pieces() -> Any:
            nonlocal sent
            for _ in range(5):
                sent += 500_000
                yield bytes(500_000)

        assert endpoint.client.post("/v1/upscale", content=pieces()).status_code == 413
        assert endpoint.services.budget.used == 0

    def test_unknown_places_and_methods(self, endpoint: Any) -> None:
        for method, path, status in (
            ("GET", "/v2", 404),
            ("PUT", "/v1/upscale", 405),
            ("GET", "/problems/x", 404),
            ("GET", "/static/none.js", 404),
        ):
            answer = endpoint.client.request(method, path)
            assert (answer.status_code, answer.headers["content-type"]) == (
                status,
                "application/problem+json",
            )
        for path, methods in (
            ("/v1/jobs", "GET, HEAD, POST"),
            ("/v1/jobs/x", "DELETE, GET, HEAD"),
            ("/healthz", "GET, HEAD"),
        ):
            assert endpoint.client.patch(path).headers["allow"] == methods

    def test_a_mistake_of_ours_tells_nothing(self, start_endpoint: Callable[..., Any]) -> None:
        broken = start_endpoint()

        async def fail(*_: object, **__: object) -> None:
            raise RuntimeError("secret")

        broken.model.upscale = fail
        answer = broken.post(encoded(0, 20, 24))
        assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
        assert "secret" not in answer.text


def request_of(*messages: dict[str, Any], forever: bool = False) -> Any:
    """Return a request whose body arrives as told, then (or `forever`) nothing more."""
    from starlette.requests import Request

    left = list(messages)

    async def receive() -> dict[str, Any]:
        if not left and forever:
            await asyncio.sleep(3600)
        return left.pop(0)

    return Request(
        {"type": "http", "method": "POST", "headers": [], "path": "/", "query_string": b""}, receive
    )


def test_a_slow_client_is_given_up_and_its_bytes_forgotten() -> None:
    budget = ByteBudget(1000)
    reader = Reader(LimitSettings(body_s=0.05), budget)
    request = request_of({"type": "http.request", "body": b"abc", "more_body": True}, forever=True)
    with pytest.raises(Problem) as refused:
        asyncio.run(reader.read(request))
    assert (refused.value.status, budget.used) == (408, 3)
    reader.close()
    assert budget.used == 0


def test_a_client_that_leaves_while_it_sends() -> None:
    reader = Reader(LimitSettings(), ByteBudget(1000))
    request = request_of(
        {"type": "http.request", "body": b"abc", "more_body": True}, {"type": "http.disconnect"}
    )
    with pytest.raises(Problem) as refused:
        asyncio.run(reader.read(request))
    assert refused.value.status == 499


@pytest.mark.parametrize(
    ("headers", "messages_read", "closes"),
    [
        ([(b"transfer-encoding", b"chunked")], 0, True),
        ([(b"transfer-encoding", b"chunked")], 1, True),
        ([(b"transfer-encoding", b"chunked")], 2, False),
        ([(b"content-length", b"5000000")], 1, True),
        ([(b"content-length", b"5000000")], 2, False),
        ([(b"content-length", b"4000")], 0, False),
        ([], 0, False),
    ],
)
def test_an_answer_before_the_end_of_a_body_closes_the_connection(
    headers: list[tuple[bytes, bytes]], messages_read: int, closes: bool
) -> None:
    """Unless the rest is so short that the server may as well read it."""
    sent: list[MutableMapping[str, Any]] = []
    body = [{"type": "http.request", "body": b"x", "more_body": more} for more in (True, False)]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        del scope
        for _ in range(messages_read):
            await receive()
        await send({"type": "http.response.start", "status": 401, "headers": []})

    async def receive() -> MutableMapping[str, Any]:
        return body.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    services: Any = SimpleNamespace(metrics=Metrics(), access=AccessLog(""))
    scope = {"type": "http", "path": "/v1/upscale", "headers": headers}
    asyncio.run(Answering(app, services)(scope, receive, send))
    assert ((b"connection", b"close") in sent[0]["headers"]) == closes


class TestOverload:
    def test_the_line_is_bounded_and_refusals_say_when_to_come_again(
        self, start_endpoint: Callable[..., Any]
    ) -> None:
        """Ten requests for one slot and a line of two: three are answered, seven are refused at once."""
        import httpx2

        crowded = start_endpoint(limits={"in_flight": 1, "queue": 2})
        data = encoded(0, 20, 24)

        async def play() -> list[Any]:
            transport = httpx2.ASGITransport(crowded.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                crowded.model.is_held = True
                sent = [asyncio.create_task(client.post("/v1/upscale", content=data)) for _ in range(10)]
                while sum(one.done() for one in sent) < 7:
                    await asyncio.sleep(0.01)
                crowded.model.is_held = False
                return await asyncio.gather(*sent)

        answers = asyncio.run(play())
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 7
        for answer in answers:
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
            else:
                assert np.array_equal(decoded(answer.content), enlarged(data))
        assert crowded.model.num_begun == 3

    def test_a_deadline_ends_the_wait_before_the_model_is_asked(
        self, start_endpoint: Callable[..., Any]
    ) -> None:
        import httpx2

        crowded = start_endpoint(limits={"in_flight": 1, "queue": 5})
        data = encoded(0, 20, 24)

        async def play() -> tuple[int, int]:
            transport = httpx2.ASGITransport(crowded.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                crowded.model.is_held = True
                first = asyncio.create_task(client.post("/v1/upscale", content=data))
                while not crowded.model.num_begun:
                    await asyncio.sleep(0.01)
                late = await client.post("/v1/upscale", content=data, headers={"X-Request-Timeout": "0.2"})
                crowded.model.is_held = False
                return (await first).status_code, late.status_code

        assert asyncio.run(play()) == (200, 503)
        assert crowded.model.num_begun == 1

    @pytest.mark.slow
    def test_a_deadline_that_passes_at_work_is_504(self, start_endpoint: Callable[..., Any]) -> None:
        crowded = start_endpoint()
        crowded.model.is_held = True
        answer = crowded.post(encoded(0, 20, 24), headers={"X-Request-Timeout": "3"})
        assert answer.status_code == 504
        assert crowded.pictures.admission.num_working == 0

    def test_work_of_a_client_that_left_is_dropped(self, start_endpoint: Callable[..., Any]) -> None:
        crowded = start_endpoint()
        crowded.model.is_held = True
        data, sent = encoded(0, 20, 24), list[Any]()

        async def play() -> None:
            messages = [{"type": "http.request", "body": data, "more_body": False}]

            async def receive() -> dict[str, Any]:
                if messages:
                    return messages.pop(0)
                while not crowded.model.num_begun:
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}

            async def send(message: dict[str, Any]) -> None:
                sent.append(message)

            headers = [(b"host", b"127.0.0.1")]
            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/upscale",
                "query_string": b"",
                "headers": headers,
            }
            await crowded.app(
                scope | {"client": ("127.0.0.1", 1), "scheme": "http", "http_version": "1.1"}, receive, send
            )

        asyncio.run(play())
        assert sent[0]["status"] == 499
        assert (crowded.model.num_begun, crowded.model.num_done) == (1, 0)
        assert (crowded.pictures.admission.num_working, crowded.services.budget.used) == (0, 0)


class TestKeys:
    def test_a_key_is_needed_and_has_its_quota(self, start_endpoint: Callable[..., Any]) -> None:
        key = new_key()
        entry = {
            "name": "alice",
            "sha256": digest(key),
            "requests_per_minute": 3,
            "megapixels_per_minute": 0.0009,
        }
        guarded = start_endpoint(keys=[entry])
        data, headers = encoded(0, 20, 24), {"Authorization": f"Bearer {key}"}
        assert guarded.post(data).status_code == 401
        assert guarded.post(data, headers=headers).status_code == 200
        used_up = guarded.post(data, headers=headers)  # 480 pixels twice are more than 900
        assert used_up.status_code == 429
        assert 1 <= int(used_up.headers["retry-after"]) <= 60
        assert guarded.client.get("/v1/models", headers=headers).status_code == 200
        assert guarded.client.get("/v1/models", headers=headers).status_code == 429  # the fourth request
        assert guarded.client.get("/healthz").status_code == 200
        assert guarded.client.get("/").status_code == 200

    def test_pages_of_named_origins_may_call(self, start_endpoint: Callable[..., Any]) -> None:
        key, origin = new_key(), "https://photos.example.org"
        entry = {"name": "alice", "sha256": digest(key)}
        client = start_endpoint(keys=[entry], cors=[origin]).client
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = client.options("/v1/upscale", headers={"Origin": origin, **asking})
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, origin)
        assert client.options("/v1/upscale", headers={"Origin": "https://a.org", **asking}).status_code == 400
        headers = {"Origin": origin, "Authorization": f"Bearer {key}"}
        made = client.post("/v1/upscale", content=encoded(0, 20, 24), headers=headers)
        assert made.headers["access-control-allow-origin"] == origin
        assert "X-Result-Size" in made.headers["access-control-expose-headers"]
        assert (
            "access-control-allow-origin"
            not in start_endpoint(keys=[entry]).client.get("/v1/models", headers=headers).headers
        )
        with pytest.raises(ValueError, match="cors needs keys"):
            start_endpoint(cors=[origin])

    def test_every_request_is_a_line_of_the_access_log(
        self, start_endpoint: Callable[..., Any], tmp_path: Path
    ) -> None:
        key, log = new_key(), tmp_path / "access.jsonl"
        entry = {"name": "alice", "sha256": digest(key)}
        guarded, data = start_endpoint(keys=[entry], access_log=str(log)), encoded(0, 20, 24)
        made = guarded.post(data, "/v1/upscale?seed=1", headers={"X-API-Key": key})
        guarded.post(data)
        first, second = (json.loads(line) for line in log.read_text().splitlines())
        assert first["caller"] == "alice"
        assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/upscale", 200)
        assert (first["bytes_in"], first["bytes_out"]) == (len(data), len(made.content))
        assert (second["caller"], second["status"]) == ("", 401)
        assert key not in log.read_text()

    @pytest.mark.parametrize("path", ["/v1/upscale", "/v1/jobs"])
    def test_the_body_of_a_stranger_is_not_read(self, path: str, start_endpoint: Callable[..., Any]) -> None:
        guarded = start_endpoint(keys=[{"name": "alice", "sha256": digest(new_key())}])
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was asked for")

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"1000000"),
            (b"host", b"127.0.0.1"),
        ]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        asyncio.run(
            guarded.app(
                scope | {"client": ("127.0.0.1", 1), "scheme": "http", "http_version": "1.1"}, receive, send
            )
        )
        assert sent[0]["status"] == 401


class TestReadiness:
    def test_ready_means_a_pass_in_the_last_seconds(self) -> None:
        now = [0.0]
        readiness = Readiness(window_s=4, busy_s=60, clock=lambda: now[0])
        readiness.num_replicas = 1
        assert not readiness.is_ready  # nothing has come through yet
        readiness.begin()
        assert not readiness.is_ready
        readiness.end(True)
        assert readiness.is_ready
        now[0] = 4.1
        assert not readiness.is_ready  # too long ago
        readiness.begin()
        assert readiness.is_ready  # something large may be under way
        readiness.num_replicas = 0
        assert not readiness.is_ready  # at nothing
        readiness.num_replicas = 1
        readiness.end(False)
        now[0] = 4.2
        assert not readiness.is_ready
        readiness.begin()
        readiness.end(None)  # a bad picture says nothing about the model
        assert not readiness.is_ready
        readiness.begin()
        readiness.end(True)
        assert readiness.is_ready

    def test_a_model_that_may_sleep_is_ready_without_replicas_until_it_does_not_wake(self) -> None:
        now = [0.0]
        readiness = Readiness(may_sleep=True, start_s=60, clock=lambda: now[0])
        assert readiness.is_ready
        assert readiness.is_asleep
        readiness.begin()
        now[0] = 59.0
        assert readiness.is_ready  # a replica is being started
        assert not readiness.is_asleep
        readiness.end(None)  # the client went away before it was
        now[0] = 500.0
        assert readiness.is_ready
        readiness.begin()
        now[0] = 561.0
        assert not readiness.is_ready  # it does not start
        readiness.end(None)
        assert not readiness.is_ready
        readiness.begin()
        readiness.num_replicas = 1  # there it is
        assert readiness.is_ready
        now[0] = 900.0
        readiness.end(True)
        now[0] = 2000.0
        assert readiness.is_ready  # no pass is needed to stay so
        readiness.begin()
        readiness.end(False)
        assert not readiness.is_ready
        readiness.begin()
        readiness.end(True)
        readiness.num_replicas = 0
        assert readiness.is_asleep

    @pytest.mark.slow
    def test_a_sleeping_model_is_not_woken_by_probes(self, start_endpoint: Callable[..., Any]) -> None:
        made = start_endpoint(sleeping=("nearest-x4",))
        made.model.num_replicas = 0
        with made.client as client:
            assert client.get("/readyz").status_code == 200
            assert client.get("/readyz").json()["models"]["nearest-x4"]["asleep"]
            made.model.num_replicas = 1  # somebody else woke it
            wait_until(lambda: client.get("/readyz").json()["models"]["nearest-x4"]["replicas"] == 1)
            looks = made.model.num_looks
            wait_until(lambda: made.model.num_looks > looks + 2)
            assert made.model.num_probes == 0

    @pytest.mark.slow
    def test_readyz_follows_the_replicas(self, start_endpoint: Callable[..., Any]) -> None:
        made = start_endpoint()
        with made.client as client:
            wait_until(lambda: client.get("/readyz").status_code == 200)
            assert client.get("/readyz").json()["models"]["nearest-x4"]["replicas"] == 1
            assert made.model.num_probes > 0
            made.model.num_replicas = 0
            wait_until(lambda: client.get("/readyz").status_code == 503)
            assert client.get("/healthz").status_code == 200
            made.model.num_replicas = 1
            wait_until(lambda: client.get("/readyz").status_code == 200)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


class TestDescription:
    def test_models_and_metrics(self, endpoint: Any) -> None:
        listed = endpoint.client.get("/v1/models").json()["models"]
        assert [(one["name"], one["scale"], one["outscale"]) for one in listed] == [("nearest-x4", 4, [4])]
        before = figure(endpoint, 'resshift_megapixels_total{side="out"}')
        endpoint.post(encoded(0, 100, 100))
        assert figure(endpoint, 'resshift_megapixels_total{side="out"}') == pytest.approx(before + 0.16)
        assert figure(endpoint, 'resshift_http_requests_total{route="/v1/upscale",status="200"}') >= 1
        assert figure(endpoint, "resshift_body_bytes") == 0

    def test_every_operation_of_the_document_has_an_answer(self, endpoint: Any) -> None:
        """A request without sense to every operation is a client's error, never ours."""
        document = endpoint.client.get("/openapi.json").json()
        for path, verbs in document["paths"].items():
            for verb in verbs:
                answer = endpoint.client.request(verb, path.replace("{", "").replace("}", ""), content=b"{]")
                assert answer.status_code < 500 or path == "/readyz", (verb, path, answer.text)

    def test_the_document_says_what_a_job_is(self, endpoint: Any) -> None:
        document = endpoint.client.get("/openapi.json").json()
        answer = document["paths"]["/v1/jobs/{id}"]["get"]["responses"]["200"]["content"]["application/json"]
        assert answer["schema"] == {"$ref": "#/components/schemas/JobView"}
        shape = document["components"]["schemas"]["JobView"]
        assert set(shape["required"]) == {"id", "kind", "state", "created", "ended", "request"}
        assert set(shape["properties"]) - set(shape["required"]) == {
            "message",
            "progress",
            "counts",
            "result",
        }

    def test_pages_load_nothing_from_elsewhere(self, endpoint: Any) -> None:
        for path in ("/", "/docs", *(f"/static/{file.name}" for file in Path("serve/static").iterdir())):
            answer = endpoint.client.get(path)
            assert answer.status_code == 200
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert not re.search(r"https?://(?!www.w3.org/2000/svg)|@import|url\(", answer.text)
            assert (
                endpoint.client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code
                == 304
            )

    def test_kinds_of_problems_are_explained(self, endpoint: Any) -> None:
        for kind in KINDS:
            assert endpoint.client.get(f"/problems/{kind}").json()["title"] == KINDS[kind].title


def figure(endpoint: Any, name: str) -> float:
    lines = endpoint.client.get("/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), 0.0)
