"""An endpoint as a function, from any machine: the standard library and Pillow, no torch.

    from resshift import Client

    upscale = Client("https://photos.example.org", key)
    large = upscale(Image.open("photo.jpg"), seed=7, outscale=2)    # a picture in, a picture out
    data = upscale(Path("photo.jpg").read_bytes(), format="jpeg")   # or a file in, a file out

A server that is busy is asked again when it says. Pictures of more than `LONG_PIXELS`, or of a size that is
not known here, are jobs: no request waits for them, and a client that stops cancels its job.
"""

from __future__ import annotations

import io
import json
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from time import monotonic, sleep
from typing import Any, TypeVar

from PIL import Image

LONG_PIXELS = 250_000
_BUSY = (429, 503)
_RETRY_S = 2.0
_LOOK_S = (0.2, 2.0)  # between two looks at a job, at first and at last
_ANSWER_S = 120.0  # for a request; the server's own deadline is 60 s

File = TypeVar("File", bytes, Image.Image)


class EndpointError(Exception):
    """What the server refuses, in its own words.

    Fields:
        status: HTTP status; 0 if a job failed.
        problem: Body of the answer, an RFC 9457 problem; empty if there was none.
    """

    def __init__(self, message: str, status: int = 0, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.problem = status, dict(problem or {})


class _Busy(Exception):
    """The server may be asked again after so many seconds."""

    def __init__(self, seconds: float, why: str) -> None:
        super().__init__(why)
        self.seconds = seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for one server, and redirects would carry it to another."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


class Client:
    """Calls an endpoint.

    Args:
        url: Address of the endpoint, http:// or https://.
        key: API key, if the server requires one.
        timeout_s: Longest time that a picture may take, with all waiting.

    Raises:
        ValueError: The address is none.
    """

    def __init__(self, url: str, key: str = "", *, timeout_s: float = 3600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, image: File, *, mask: File | None = None, **options: Any) -> File:
        """Upscale a picture.

        Args:
            image: Picture, or the bytes of a file in any format that the server reads.
            mask: For models that fill holes: bright or transparent in the hole; of the kind of `image`.
            options: Options of `POST /v1/upscale`: model, outscale, steps, seed, fidelity, format and so on;
                unknown ones are refused by the server, with the names that there are. With `trajectory=True`,
                for bytes alone, the result is a ZIP file.

        Returns:
            The same kind: a picture, or the bytes of the file that the server made.

        Raises:
            EndpointError: The server refuses the picture, an option or the key, or cannot be reached.
            TimeoutError: The picture was not done in time.
        """
        if not isinstance(image, Image.Image):
            return self._upscale(image, mask if isinstance(mask, bytes) else None, options)
        if options.get("trajectory"):
            raise ValueError("trajectory is for the bytes of a file: its result is a ZIP file")
        shown = _png(mask) if isinstance(mask, Image.Image) else None
        result = Image.open(io.BytesIO(self._upscale(_png(image), shown, {"format": "png"} | options)))
        result.load()
        return result

    def models(self) -> list[dict[str, Any]]:
        """Return the models and what may be asked of them, the default first."""
        return json.loads(self._asked("GET", "/v1/models", monotonic() + _ANSWER_S)[0])["models"]

    def _upscale(self, data: bytes, mask: bytes | None, options: Mapping[str, Any]) -> bytes:
        deadline = monotonic() + self.timeout_s
        asked = {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in options.items()
            if value is not None
        }
        body, kind = (data, "application/octet-stream") if mask is None else _form(image=data, mask=mask)
        # The same key again gives the same job: an answer that is lost on the way makes no second one.
        headers = {"Content-Type": kind, "Idempotency-Key": secrets.token_hex(16)}
        if _is_long(data):
            headers["Prefer"] = "respond-async"
        path = f"/v1/upscale?{urllib.parse.urlencode(asked)}"
        answer, status = self._asked("POST", path, deadline, body, headers)
        return self._finished(json.loads(answer), deadline) if status == 202 else answer

    def _finished(self, job: dict[str, Any], deadline: float) -> bytes:
        """Wait for a job, and forget it whatever comes."""
        path, pause = f"/v1/jobs/{job['id']}", _LOOK_S[0]
        try:
            while job["state"] in ("queued", "running"):
                if monotonic() + pause > deadline:
                    raise TimeoutError(f"the picture was not done within {self.timeout_s:g} s")
                sleep(pause)
                pause = min(_LOOK_S[1], 1.5 * pause)
                job = json.loads(self._asked("GET", path, deadline)[0])
            if job["state"] != "complete":
                raise EndpointError(job.get("message") or f"the job is {job['state']}")
            return self._asked("GET", f"{path}/result", deadline)[0]
        finally:
            self._asked("DELETE", path, monotonic() + _ANSWER_S)

    def _asked(
        self, method: str, path: str, deadline: float, body: bytes | None = None, headers: Any = None
    ) -> tuple[bytes, int]:
        """Return body and status of an answer; a server that is busy or away is asked again until the
        deadline.
        """
        while True:
            try:
                return self._once(method, path, deadline, body, headers or {})
            except _Busy as busy:
                if monotonic() + busy.seconds > deadline:
                    raise TimeoutError(f"no answer within {self.timeout_s:g} s: {busy}") from None
                sleep(busy.seconds)

    def _once(
        self, method: str, path: str, deadline: float, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[bytes, int]:
        request = urllib.request.Request(self.url + path, body, {**self._headers, **headers}, method=method)
        seconds = max(1.0, min(_ANSWER_S, deadline - monotonic()))
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                return answer.read(), answer.status
        except urllib.error.HTTPError as error:
            with error:
                problem = _problem(error.read())
            told = f"{problem.get('title', f'HTTP {error.code}')}: {problem.get('detail', error.reason)}"
            wait = error.headers.get("Retry-After", "")
            if error.code in _BUSY and wait.isdecimal():
                raise _Busy(float(wait), told) from None
            raise EndpointError(told, error.code, problem) from None
        except (ConnectionResetError, HTTPException, TimeoutError) as error:
            raise _Busy(_RETRY_S, f"{self.url} does not answer: {error}") from None
        except urllib.error.URLError as error:
            raise EndpointError(f"{self.url} cannot be reached: {error.reason}") from None


def _is_long(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height > LONG_PIXELS
    except Exception:  # a format that Pillow does not read: the server may
        return True


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _form(**files: bytes) -> tuple[bytes, str]:
    """Return a form with files, and its content type."""
    boundary = secrets.token_hex(16)
    parts: list[bytes] = []
    for name, data in files.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
        parts += [head.encode(), data, b"\r\n"]
    return b"".join([*parts, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"


def _problem(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:  # a proxy's page
        return {}
    return value if isinstance(value, dict) else {}
