"""Send a real endpoint what it must refuse: broken files, bombs, endless and slow bodies, bad forms, places
it must not reach.

    python tests/chaos/hostile_http.py malformed.tar

The archive is that of malformed.py. Every answer must have the right status in bounded time, the gateway must
not grow, and a good picture must go through afterwards. Bodies without end are a gigabyte, sent in chunks; a
slow client sends a byte a second. All this has a key. Then bodies without end come from many clients at a
time, first from strangers, who send on whatever they are answered, then with the key; their peaks of memory
are figures of docs/security.md.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import httpx2
from malformed import expected_files, own_archive

from serve.http.keys import digest, new_key
from tests.pictures import encoded

PICTURE = encoded(height=16, width=16)
REFUSED = {400, 413, 415, 422}
ALLOWED = {
    "decode": {200},
    "decode_or_refuse": {200} | REFUSED,
    "refuse_or_partial": {200} | REFUSED,
    "refuse": REFUSED,
    "refuse_too_large": {413},
    "large_ok_or_refuse": {200, 413},
}
BODY_S = 5  # limits.body_s of the endpoint
GIGABYTE = 10**9
# Of a gateway: its own memory, and with the pages of Ray's object store that it has seen, which are the
# store's.
OWN, RESIDENT = "resshift_own_memory_bytes", "process_resident_memory_bytes"
SETTLE_S = 5
CLIENTS = 32
PROXY, GATEWAY = "ray::ProxyActor", "ray::ServeReplica:resshift:gateway"
KEY = new_key()
Memory = dict[str, float]


@dataclass
class Tally:
    """What was answered: statuses by kind of attack, what was wrong, and the longest time."""

    statuses: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    wrong: list[str] = field(default_factory=list[str])
    longest_s: float = 0.0

    def note(self, kind: str, name: str, allowed: set[int], send: Callable[[], int]) -> None:
        """Send one thing; a status outside `allowed` is wrong (0: no answer)."""
        began = time.monotonic()
        status = send()
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        self.statuses[kind][status] += 1
        if status not in allowed:
            self.wrong.append(f"{kind} {name}: {status}, allowed {sorted(allowed)}")


def endless(sent: list[int]) -> Iterator[bytes]:
    """Yield a gigabyte in chunks, counting."""
    chunk = bytes(1 << 16)
    for _ in range(GIGABYTE // len(chunk)):
        sent[0] += len(chunk)
        yield chunk


def raw(port: int, head: str, body: Iterator[bytes], timeout_s: float = 60) -> int:
    """Send bytes as they come and return the status, 0 when the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(head.encode())
        stop = threading.Event()

        def send() -> None:
            try:
                for part in body:
                    if stop.is_set():
                        return
                    connection.sendall(part)
            except OSError:
                return  # the server has heard enough; its answer is read below

        sender = threading.Thread(target=send)
        sender.start()
        try:
            answer = connection.recv(4096)
        except OSError:
            answer = b""
        finally:
            stop.set()
            connection.close()
            sender.join()
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def deaf(port: int, head: str, body: Iterator[bytes], timeout_s: float = 60) -> int:
    """Send bytes whatever is answered, as long as the server takes them, and return the status as `raw`."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        try:
            connection.sendall(head.encode())
            for part in body:
                connection.sendall(part)
            answer = connection.recv(4096)
        except ConnectionError:
            return 0
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def resident_bytes() -> Memory:
    """Return the resident memory of the proxy and of the gateway."""
    found = {PROXY: 0.0, GATEWAY: 0.0}
    for entry in Path("/proc").iterdir():
        for name in found:
            if entry.name.isdigit() and harness.title(int(entry.name)).startswith(name):
                status = (entry / "status").read_text()
                found[name] = max(found[name], 1024 * float(status.split("VmRSS:")[1].split()[0]))
    return found


def flood(port: int, head: str, send: Callable[[int, str, Iterator[bytes]], int]) -> dict[str, Any]:
    """Send endless bodies from many clients at a time; return statuses, megabytes taken of all, seconds, and
    how far the memory of proxy and gateway grew meanwhile.
    """
    sent = [[0] for _ in range(CLIENTS)]
    before, began = resident_bytes(), time.monotonic()
    peak = dict(before)
    with ThreadPoolExecutor(CLIENTS) as threads:
        asked = [threads.submit(send, port, head, chunks(one)) for one in sent]
        while not all(one.done() for one in asked):
            for name, held in resident_bytes().items():
                peak[name] = max(peak[name], held)
            time.sleep(0.1)
    return {
        "statuses": dict(sorted(Counter(one.result() for one in asked).items())),
        "taken_mb": round(sum(taken for (taken,) in sent) / 1e6),
        "seconds": round(time.monotonic() - began, 1),
        "proxy_grew_mb": round((peak[PROXY] - before[PROXY]) / 1e6),
        "gateway_grew_mb": round((peak[GATEWAY] - before[GATEWAY]) / 1e6),
    }


def chunks(sent: list[int]) -> Iterator[bytes]:
    """Yield the chunks of `endless` as HTTP frames them."""
    for chunk in endless(sent):
        yield f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n"


def trickle(seconds: int) -> Iterator[bytes]:
    """Yield a byte a second."""
    for _ in range(seconds):
        yield b"x"
        time.sleep(1)


def head_of(port: int) -> str:
    """Return the beginning of a request, without the empty line."""
    return f"POST /v1/upscale HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/png\r\n"


def attack(
    base: str, port: int, files: list[dict[str, Any]], root: Path, allowed_root: str, tally: Tally
) -> list[tuple[float, Memory]]:
    """Send everything; returns how much of endless bodies was taken and the gateway's memory, before the
    first and after each.
    """
    client = httpx2.Client(base_url=base, timeout=120, headers={"x-api-key": KEY})
    post = f"{base}/v1/upscale"

    def status(**request: Any) -> Callable[[], int]:
        return lambda: client.post(post, **request).status_code

    for one in files:
        tally.note(
            one["expect"],
            one["path"],
            ALLOWED[one["expect"]],
            status(content=(root / one["path"]).read_bytes()),
        )

    forms = {
        "no boundary": {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        "wrong boundary": {
            "content": b"--a\r\n\r\nx",
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        "no end": {
            "content": b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + PICTURE,
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        "two images": {"files": [("image", ("a", PICTURE)), ("image", ("b", PICTURE))]},
        "no image": {"files": {"other": ("a", PICTURE)}},
        "thousand fields": {"data": {f"f{i}": "x" for i in range(1000)}, "files": {"image": ("a", PICTURE)}},
        "unknown field": {"data": {"stepps": "4"}, "files": {"image": ("a", PICTURE)}},
        "long name": {"files": {"image": ("n" * 100_000, PICTURE)}},
    }
    for name, request in forms.items():
        tally.note("multipart", name, REFUSED | ({200} if name == "long name" else set()), status(**request))

    places = [
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1:8265/",
        "https://example.com/x.png",
        "gopher://x",
        "file:///etc",
    ]
    places += ["/etc", "/proc/self", "//etc", "~/.ssh", "s3://not-mine/x", "s3://", "", "\x00"]
    places += [f"{allowed_root}/../..", f"{allowed_root}/../../etc"]
    for place in places:
        for job in (
            {"source": place, "target": f"{allowed_root}/out"},
            {"source": f"{allowed_root}/in", "target": place},
        ):
            tally.note(
                "places",
                repr(place),
                {400, 403, 422},
                lambda job=job: client.post("/v1/jobs", json=job).status_code,
            )
        tally.note(
            "places",
            f"?url={place!r}",
            REFUSED,
            lambda place=place: client.post(post, params={"url": place}, content=PICTURE).status_code,
        )

    odd = {
        ("GET", "/v1/upscale"): {405},
        ("POST", "/v1/jobs"): {422},
        ("GET", "/v1/jobs/%2e%2e%2f%2e%2e%2fetc"): {404},
        ("GET", "/static/..%2f..%2fpyproject.toml"): {404},
        ("DELETE", "/v1/jobs/none"): {404},
        ("GET", "/" + "a" * 5000): {404, 414},
    }
    for (method, path), allowed in odd.items():
        tally.note(
            "addresses",
            f"{method} {path[:40]}",
            allowed,
            lambda m=method, p=path: client.request(m, p).status_code,
        )

    sent = [0]
    head = head_of(port) + f"X-API-Key: {KEY}\r\n"
    tally.note(
        "gigabyte",
        "announced",
        {413},
        lambda: raw(port, head + f"Content-Length: {GIGABYTE}\r\n\r\n", iter(())),
    )

    endings = [
        (0.0, _gateway_bytes(base))
    ]  # whatever pictures of many megapixels have left behind is not of the bodies
    for _ in range(4):
        sent[0] = 0
        tally.note(
            "gigabyte",
            "chunked",
            {413},
            lambda: raw(port, head + "Transfer-Encoding: chunked\r\n\r\n", chunks(sent)),
        )
        endings.append((sent[0], _gateway_bytes(base)))
    tally.note("slow", "body", {408}, lambda: raw(port, head + "Content-Length: 100000\r\n\r\n", trickle(60)))
    holders = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]  # headers that never end
    for holder in holders:
        holder.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nX-A: ")
    tally.note("slow", "beside 200 unfinished headers", {200}, status(content=PICTURE))
    for holder in holders:
        holder.close()
    return endings


def main() -> int:
    """Run and compare."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("archive", nargs="?")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        work = Path(temporary)
        archive = Path(chosen.archive) if chosen.archive else work / "own.tar"
        if not chosen.archive:
            own_archive(archive)
        files = expected_files(archive, work / "files")
        (work / "jobs" / "in").mkdir(parents=True)

        def change(config: Any) -> None:
            args = config["applications"][-1]["args"]
            args["limits"] |= {"body_s": BODY_S}
            args["jobs"]["state"] = str(work / "state")
            args["keys"] = [{"name": "chaos", "sha256": digest(KEY)}]

        tally = Tally()
        with harness.endpoint(
            work, change, "--model", "nearest-x4", "--jobs", f"{work}/jobs:{work}/jobs"
        ) as (server, port, _):
            base = f"http://127.0.0.1:{port}"
            _wait_until_ready(base, server)
            before = _gateway_bytes(base)
            endings = attack(base, port, files, work / "files", str(work / "jobs"), tally)
            after = _gateway_bytes(base)
            endless_head = "Transfer-Encoding: chunked\r\n\r\n"
            floods = {
                "strangers": flood(port, head_of(port) + endless_head, deaf),
                "key_holders": flood(port, head_of(port) + f"X-API-Key: {KEY}\r\n" + endless_head, raw),
            }
            last = httpx2.post(
                f"{base}/v1/upscale", content=PICTURE, headers={"x-api-key": KEY}, timeout=60
            ).status_code
            is_ready = httpx2.get(f"{base}/readyz", timeout=30).status_code
    for kind, statuses in sorted(tally.statuses.items()):
        print(f"{kind:20} {dict(statuses.most_common())}")
    for line in tally.wrong:
        print("  " + line)
    everything = Counter[int]()
    for statuses in tally.statuses.values():
        everything.update(statuses)
    gateway = [before, *(held for _, held in endings), after]
    grown = {name: max(one[name] for one in gateway[1:]) for name in (OWN, RESIDENT)}
    result = {
        "sent": everything.total(),
        "statuses": dict(sorted(everything.items())),
        "wrong": len(tally.wrong),
        "longest_s": round(tally.longest_s, 1),
        "taken_of_gigabytes_mb": [round(taken / 1e6) for taken, _ in endings[1:]],
        "gateway_mb": [round(one[OWN] / 1e6) for one in gateway],
        "gateway_and_store_mb": [round(one[RESIDENT] / 1e6) for one in gateway],
        "floods": floods,
    }
    strangers, holders = floods["strangers"], floods["key_holders"]
    claims = {
        "every answer is one that is allowed": not tally.wrong,
        "no answer is a mistake of the server": not everything[500] and not everything[0],
        "no answer took longer than a limit and a few seconds": tally.longest_s < 30,
        "an endless body is cut off before half of it came": max(taken for taken, _ in endings)
        < GIGABYTE / 2,
        "the gateway did not grow by more than 300 MB": grown[RESIDENT] - before[RESIDENT] < 300e6,
        "the gateway's own memory grew by less than 50 MB": grown[OWN] - before[OWN] < 50e6,
        "strangers are refused, or the connection is closed": set(strangers["statuses"]) <= {0, 401},
        "strangers cost less than 200 MB": strangers["proxy_grew_mb"] + strangers["gateway_grew_mb"] < 200,
        "every endless body with a key is refused": set(holders["statuses"]) <= {408, 413, 503},
        "a good picture goes through afterwards": (last, is_ready) == (200, 200),
    }
    return harness.report(result, claims)


def _wait_until_ready(base: str, server: subprocess.Popen[bytes], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if httpx2.get(f"{base}/readyz", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError as error:
            if server.poll() is not None:
                raise RuntimeError(f"the endpoint ended with {server.returncode}") from error
        if time.monotonic() > deadline:
            raise RuntimeError("the endpoint is not ready")
        time.sleep(0.5)


def _gateway_bytes(base: str) -> Memory:
    """Return what the gateway holds, as it says itself some seconds after the last request, when what is free
    has been given back.
    """
    time.sleep(SETTLE_S)
    lines = (line.split() for line in httpx2.get(f"{base}/metrics", timeout=30).text.splitlines())
    found = {line[0]: float(line[1]) for line in lines if line[0] in (OWN, RESIDENT)}
    if len(found) != 2:
        raise RuntimeError("the gateway does not tell its memory")
    return found


if __name__ == "__main__":
    sys.exit(main())
