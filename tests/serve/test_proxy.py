"""The recipe for nginx, run as it is on loopback: closed without a key, open with one, bodies limited."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from serve.http.keys import digest, new_key
from serve.http.problems import KINDS, MEDIA_TYPE
from tests.pictures import decoded, encoded, enlarged
from tests.servers import serving

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "deploy" / "proxy" / "nginx.conf"
PLAIN = "server {{ listen 127.0.0.1:{front}; location / {{ proxy_pass http://127.0.0.1:{back}; }} }}"
KEY = new_key()
WAIT_S = 60


@contextlib.contextmanager
def nginx(folder: Path, server: str, port: int) -> Generator[str]:
    command = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if command is None:
        pytest.skip("nginx is not installed")
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
        f"http {{ access_log off;\n{temporary}{server}\n}}\n"
    )
    running = subprocess.Popen([command, "-p", str(folder), "-c", str(configuration)])
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            assert running.poll() is None, (folder / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.terminate()
        running.wait(30)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return bound.getsockname()[1]


def test_nginx_hands_on_what_has_a_key_and_limits_bodies(
    start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    log = tmp_path / "access.jsonl"
    endpoint = start_endpoint(keys=[{"name": "alice", "sha256": digest(KEY)}], access_log=str(log))
    front = free_port()
    with serving(endpoint.app) as back:
        recipe = RECIPE.read_text().replace("127.0.0.1:8080", f"127.0.0.1:{front}")
        recipe = recipe.replace("127.0.0.1:8000", f"127.0.0.1:{back}")
        with nginx(tmp_path, recipe, front) as address:
            data = encoded(3)
            assert httpx2.post(f"{address}/v1/upscale", content=data).status_code == 401
            headers = {"Authorization": f"Bearer {KEY}"}
            made = httpx2.post(f"{address}/v1/upscale", content=data, headers=headers, timeout=WAIT_S)
            assert made.status_code == 200
            assert (decoded(made.content) == enlarged(data)).all()
            too_large = httpx2.post(f"{address}/v1/upscale", content=bytes(65 << 20), headers=headers)
            assert too_large.status_code == 413
            assert too_large.headers["Content-Type"] == MEDIA_TYPE
            shown = {"type": "/problems/too_large", "title": KINDS["too_large"].title, "status": 413}
            assert too_large.json().items() >= shown.items()
            assert httpx2.get(f"{address}/metrics").status_code == 403
            assert httpx2.get(f"{address}/").status_code == 200
    assert '"caller": "alice"' in log.read_text()


def test_a_keyless_endpoint_is_closed_behind_a_plain_proxy_unless_told(
    start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    """nginx's `proxy_pass` alone writes the name of the upstream into `Host`."""
    for behind_proxy, status in ((False, 403), (True, 200)):
        front, folder = free_port(), tmp_path / str(behind_proxy)
        folder.mkdir()
        with serving(start_endpoint(behind_proxy=behind_proxy).app) as back:
            with nginx(folder, PLAIN.format(front=front, back=back), front) as address:
                assert httpx2.get(f"{address}/v1/models").status_code == status
            assert httpx2.get(f"http://127.0.0.1:{back}/v1/models").status_code == 200


def test_the_compose_file_starts_what_there_is() -> None:
    services = yaml.safe_load((RECIPE.parent / "compose.yaml").read_text())["services"]
    from serve.__main__ import arguments

    command = services["endpoint"]["command"]
    assert command[:3] == ["python", "-m", "serve"]
    assert arguments().parse_args(command[3:]).keys == "/run/keys.yaml"
    assert (RECIPE.parent / services["endpoint"]["build"]["context"] / "deploy" / "Dockerfile").exists()
    assert "127.0.0.1:8080" in RECIPE.read_text()  # which its command replaces
