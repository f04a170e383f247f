"""The endpoint on a real Ray Serve: pixels, health that tells the truth, bulk jobs, and work that is
dropped.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import numpy as np
import pytest

from pipelines.bulk.engine import EngineOptions
from pipelines.bulk.worker import Replica, ReplicaOptions, Started
from pipelines.cluster import ray_internals
from pipelines.command import UsageError
from resshift.config import Sampling
from resshift.images import Picture
from resshift.images.animation import Frames
from resshift.tiles.batching import Work
from serve.__main__ import arguments, configuration, start
from serve.replica import ReplicaSettings
from serve.settings import parse
from tests.pictures import decoded, encoded, enlarged
from tests.servers import free_port

OPTIONS = ReplicaOptions(model="nearest-x4", identity="nearest-x4")


def test_a_replica_leaves_a_picture_that_nobody_waits_for() -> None:
    replica = Replica("nearest-x4", "nearest-x4", 1)
    frames = Frames((Picture(pixels=np.zeros((8, 8, 3), np.uint8)),))
    wanted = [True, False]
    answers = list(replica.upscale(OPTIONS, ("a", "b"), frames, frames, is_wanted=lambda: wanted.pop(0)))
    assert [type(answer).__name__ for answer in answers] == ["Started", "Frames", "Upscaled"]


def test_a_picture_without_a_key_has_the_noise_of_its_seed() -> None:
    """So that an answer over HTTP equals a call of the library with the same seed."""
    seen: list[int] = []

    class Model:
        identity = "nearest-x4"

        def upscaling(self, picture: Picture, sampling: Sampling, progress: Any) -> Work[Picture]:
            del progress
            seen.append(sampling.seed)
            yield from ()
            return picture

    replica = Replica("nearest-x4", "nearest-x4", 1)
    replica.model = Model()  # pyright: ignore[reportAttributeAccessIssue] - its scale is not asked for
    frames = Frames((Picture(pixels=np.zeros((8, 8, 3), np.uint8)),))
    options = ReplicaOptions(model="nearest-x4", identity="nearest-x4", sampling=Sampling(seed=7))
    answers = list(replica.upscale(options, ("", "a"), frames, frames))
    assert isinstance(answers[0], Started)
    assert seen[0] == 7
    assert seen[1] != 7


@pytest.fixture(scope="module")
def address(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of an endpoint on the cluster of the run; 30 s a megapixel, so that work can be
    caught at it.
    """
    del ray_cluster
    from ray import serve

    root = tmp_path_factory.mktemp("serve")
    command = [
        "--model",
        "nearest-x4@30",
        "--port",
        str(free_port()),
        "--jobs",
        f"{root.parent}:{root.parent}",
    ]
    config = configuration(arguments().parse_args(command))
    config["applications"][0]["args"]["num_cpus"] = 0.5
    config["applications"][-1]["args"]["jobs"]["state"] = str(root / "state")
    config["applications"][-1]["args"]["limits"] |= {"in_flight": 4, "queue": 8}
    yield start(config)
    serve.shutdown()


def wait_for(condition: Callable[[], Any], seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)
    return found


def is_ready(address: str) -> bool:
    return httpx2.get(f"{address}/readyz", timeout=30).status_code == 200


def replica_pids() -> list[int]:
    """Return the processes of the model's replicas on this machine, of this cluster alone."""
    import ray
    from ray.util.state import list_actors

    context: Any = ray.get_runtime_context()
    found: list[Any] = list_actors(context.gcs_address, filters=[("state", "=", "ALIVE")], detail=True)
    return [
        actor.pid
        for actor in found
        if actor.name is not None and "resshift-nearest-x4#model" in actor.name and actor.pid is not None
    ]


@pytest.mark.ray
@pytest.mark.timeout(900)
class TestOnServe:
    def test_a_picture(self, address: str) -> None:
        wait_for(lambda: is_ready(address))
        data = encoded(0, 20, 24)
        answer = httpx2.post(f"{address}/v1/upscale", content=data, timeout=120)
        assert answer.status_code == 200, answer.text
        assert np.array_equal(decoded(answer.content), enlarged(data))

    def test_a_look_at_an_application_tells_what_serve_does(self, address: str) -> None:
        from ray import serve

        wait_for(lambda: is_ready(address))
        for name, told in serve.status().applications.items():
            assert ray_internals.app_status(name) == told
        assert ray_internals.app_status("resshift-unknown") is None

    def test_the_curl_examples_of_the_readme(self, address: str, tmp_path: Path) -> None:
        """They are run as they stand there, with another port."""
        import re
        import shutil
        import subprocess

        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
        commands = re.findall(r"^curl .*$", text, re.MULTILINE)
        assert len(commands) >= 3
        data = encoded(0, 30, 40, "JPEG")
        (tmp_path / "photo.jpg").write_bytes(data)
        for command in commands:
            shown = command.split("  #")[0].replace("http://127.0.0.1:8000", address)
            done = subprocess.run(
                ["bash", "-c", f"set -o pipefail; {shown}"],
                cwd=tmp_path,
                capture_output=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, (shown, done.stdout, done.stderr)
        assert np.array_equal(decoded((tmp_path / "photo_x4.png").read_bytes()), enlarged(data))

    def test_a_bulk_job_is_watched_cancelled_and_continued(self, address: str, tmp_path: Path) -> None:
        source, target = tmp_path / "in", tmp_path / "out"
        source.mkdir()
        for i in range(12):
            (source / f"{i:02}.png").write_bytes(encoded(i, 200, 250))  # 1.5 s each
        (source / "broken.png").write_bytes(encoded(9, 20, 24)[:90])
        asked = {"source": str(source), "target": str(target)}
        headers = {"Idempotency-Key": "first"}
        taken = httpx2.post(f"{address}/v1/jobs", json=asked, headers=headers, timeout=60)
        assert taken.status_code == 202, taken.text
        where = address + taken.headers["location"]
        assert (
            httpx2.post(f"{address}/v1/jobs", json=asked, headers=headers, timeout=60).json()["id"]
            == taken.json()["id"]
        )
        assert (
            httpx2.post(f"{address}/v1/jobs", json=asked, timeout=60).status_code == 409
        )  # one job a target at a time

        def progress() -> dict[str, Any] | None:
            found = httpx2.get(where, timeout=60).json().get("progress")
            return found if found and found["done"] >= 1 else None

        seen = wait_for(progress)
        assert (seen["failed"] <= 1, seen["listed"]) == (True, 13)
        assert httpx2.delete(where, timeout=120).json()["state"] == "cancelled"
        done_before = len(list(target.glob("*.png")))
        again = httpx2.post(f"{address}/v1/jobs", json=asked, timeout=60)
        where = address + again.headers["location"]
        wait_for(lambda: httpx2.get(where, timeout=60).json()["state"] not in ("queued", "running"))
        view = httpx2.get(where, timeout=60).json()
        assert (view["state"], view["counts"]["ok"], view["counts"]["failed"]) == (
            "complete_with_failures",
            12,
            1,
        )
        assert 1 <= done_before <= 12
        for i in range(12):
            expected = enlarged((source / f"{i:02}.png").read_bytes())
            assert np.array_equal(decoded((target / f"{i:02}_x4.png").read_bytes()), expected)
        report = httpx2.get(f"{where}/report", timeout=60).json()
        assert report["counts"]["ok"] == 12
        assert "truncated" in httpx2.get(f"{where}/report?format=csv", timeout=60).text

    def test_clients_that_leave_free_their_places(self, address: str) -> None:
        """Three pictures of 9 s each; the clients of the second and third leave, and the fourth is answered
        after the first.
        """
        large = encoded(0, 500, 600)
        small = encoded(1, 20, 24)

        def leave() -> None:
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(f"{address}/v1/upscale", content=large, timeout=httpx2.Timeout(60, read=1.0))

        before = figure(address, 'resshift_megapixels_total{side="in"}')
        threads = [threading.Thread(target=leave) for _ in range(2)]
        first: list[httpx2.Response] = []
        threads.insert(
            0,
            threading.Thread(
                target=lambda: first.append(httpx2.post(f"{address}/v1/upscale", content=large, timeout=200))
            ),
        )
        for thread in threads:
            thread.start()
            time.sleep(0.3)
        for thread in threads:
            thread.join()
        answer = httpx2.post(f"{address}/v1/upscale", content=small, timeout=200)
        assert (first[0].status_code, answer.status_code) == (200, 200)
        assert figure(address, 'resshift_megapixels_total{side="in"}') == pytest.approx(
            before + 0.3 + 0.00048
        )

    def test_a_replica_that_dies_takes_no_request_with_it(self, address: str) -> None:
        data = encoded(3, 200, 300)  # 1.8 s each
        answers: list[httpx2.Response] = []

        def send() -> None:
            headers = {"X-Request-Timeout": "300"}
            answers.append(httpx2.post(f"{address}/v1/upscale", content=data, timeout=400, headers=headers))

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        pids = wait_for(replica_pids)
        os.kill(pids[0], signal.SIGKILL)
        wait_for(lambda: not is_ready(address), 30)
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 4
        assert all(np.array_equal(decoded(answer.content), enlarged(data)) for answer in answers)
        wait_for(lambda: is_ready(address))

    def test_a_body_that_is_too_large_is_refused_while_it_arrives(self, address: str) -> None:
        num_sent = 0

        def pieces() -> Iterator[bytes]:
            nonlocal num_sent
            for _ in range(1000):
                num_sent += 1
                yield bytes(1_000_000)

        try:
            status = httpx2.post(f"{address}/v1/upscale", content=pieces(), timeout=60).status_code
        except httpx2.TransportError:
            # The server closed while we were still sending: the refusal may be lost on the way, the body is
            # not read.
            status = 413
        assert status == 413
        assert num_sent < 1000  # limits.body_mb is 64; more arrives while the refusal is under way
        assert figure(address, "resshift_body_bytes") == 0


def figure(address: str, name: str) -> float:
    lines = httpx2.get(f"{address}/metrics", timeout=60).text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def test_the_shipped_configuration_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a model's application holds its identity: when the weights change, the file has to."""
    import yaml

    from serve.__main__ import main

    assert main(["--print-config"]) == 0
    printed: Any = yaml.safe_load(io.StringIO(capsys.readouterr().out))
    shipped: Any = yaml.safe_load(
        (Path(__file__).parents[2] / "serve" / "config.yaml").read_text(encoding="utf-8")
    )
    assert json.loads(json.dumps(shipped)) == printed
    assert shipped["http_options"]["host"] == "127.0.0.1"


def test_models_that_may_have_no_replicas_are_told_to_the_endpoint() -> None:
    config = configuration(arguments().parse_args(["--model", "nearest-x4", "--replicas", "0:2"]))
    assert config["applications"][0]["args"] == {"model": "nearest-x4", "low": 0, "high": 2, "ongoing": 2}
    assert config["applications"][1]["args"]["sleeping"] == ["nearest-x4"]
    with pytest.raises(ValueError, match="sleeping must be some of models"):
        parse({"models": ["nearest-x4"], "sleeping": ["tiny-x4"]})


def test_what_replicas_take_at_a_time_is_what_the_endpoint_hands_on() -> None:
    config = configuration(
        arguments().parse_args(["--model", "nearest-x4", "--replicas", "1:4", "--ongoing", "16"])
    )
    model, endpoint = (one["args"] for one in config["applications"])
    assert model["ongoing"] == 16
    limits = parse(endpoint).limits
    # of each replica, and two that are decoded or answered at each gateway
    assert [limits.slots(0, 1), limits.slots(4, 1), limits.slots(4, 3)] == [18, 66, 70]
    assert parse(endpoint | {"limits": {"in_flight": 5}}).limits.slots(4, 3) == 5
    with pytest.raises(ValueError, match="ongoing must be at least 1, got 0"):
        ReplicaSettings(**model | {"ongoing": 0})


@pytest.mark.parametrize(
    "command",
    [
        ["--model", "nearest-x5"],
        ["--jobs", "here"],
        ["--replicas", "2:1"],
        ["--replicas", "0:0"],
        ["--ongoing", "0"],
        ["--faces", "/nowhere.onnx"],
        ["--port", "0"],
        ["--port", "99999"],
        ["--config", "/nowhere.yaml"],
    ],
)
def test_a_command_that_cannot_be_is_one_line(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from serve.__main__ import main

    assert main([*command, "--print-config"] if "--config" not in command else command) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_port_in_use_is_told_before_a_cluster_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve import __main__

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(__main__, "connect_to_ray", lambda: pytest.fail("a cluster was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert __main__.main(["--model", "nearest-x4", "--port", str(port)]) == 2
    assert (
        f"error: cannot listen at 127.0.0.1:{port} (Address already in use): give another"
        in capsys.readouterr().err
    )
    # Free again, so the cluster is next; and Ctrl-C while it starts is a line.
    monkeypatch.setattr(__main__, "connect_to_ray", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert __main__.main(["--model", "nearest-x4", "--port", str(port)]) == 1
    assert capsys.readouterr().err == "stopped before the endpoint answered\n"


class Elsewhere:
    """Serve as somebody else has started it a moment ago: to start it fails, and nothing listens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray import serve
        from ray.exceptions import ActorAlreadyExistsError

        def refuse(**_: Any) -> None:
            raise ActorAlreadyExistsError("SERVE_CONTROLLER_ACTOR")

        self.deployed: list[str] = []
        monkeypatch.setattr(serve, "start", refuse)
        monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}, proxies={}))
        monkeypatch.setattr(ray_internals, "app_status", lambda _: None)
        monkeypatch.setattr(serve, "run_many", lambda apps, **_: self.deployed.extend(a.name for a in apps))
        monkeypatch.setattr(serve, "get_app_handle", lambda name: SimpleNamespace(options=lambda **_: name))


def test_an_endpoint_does_not_start_on_a_serve_that_listens_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Elsewhere(monkeypatch)
    with pytest.raises(UsageError, match="without an address to listen on: start the endpoint before"):
        start(configuration(arguments().parse_args(["--model", "nearest-x4"])))
    assert elsewhere.deployed == []


def test_a_bulk_job_deploys_on_a_serve_that_somebody_else_starts_at_the_same_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from serve import engine

    elsewhere = Elsewhere(monkeypatch)
    monkeypatch.setattr(engine, "admitted", lambda options, _: options)
    deleted: list[str] = []
    monkeypatch.setattr(engine.ray_internals, "begin_to_delete", deleted.append)
    monkeypatch.setattr(engine.serve, "shutdown", lambda: pytest.fail("Serve is not this job's"))

    async def work() -> None:
        made = engine.ServeEngine(EngineOptions(model="nearest-x4", identity="nearest-x4"))
        await made.start()
        await made.close()

    asyncio.run(work())
    assert elsewhere.deployed == deleted == ["resshift-nearest-x4"]


def test_a_job_whose_application_another_one_deletes_ends_with_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no handle when it starts, then its requests are refused, then Serve itself is gone."""
    from ray.exceptions import ActorUnavailableError, RayActorError
    from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

    from serve import engine

    Elsewhere(monkeypatch)
    model = SimpleNamespace(replica_states={"RUNNING": 1}, message="")
    app = SimpleNamespace(status="RUNNING", deployments={"model": model}, message="")
    ended: list[bool] = []

    def app_status(name: str) -> Any:
        if ended:
            raise RayActorError
        return app if name == "resshift-nearest-x4" else None

    async def refuse(_: Any) -> None:
        ended.append(True)
        raise DeploymentUnavailableError(cast(Any, "model"))

    handle = SimpleNamespace(upscale=SimpleNamespace(remote=lambda *_, **__: None))
    handle.options = lambda **_: handle
    monkeypatch.setattr(
        engine.serve,
        "status",
        lambda: SimpleNamespace(applications={"resshift-nearest-x4": app}, proxies={}),
    )
    monkeypatch.setattr(engine.ray_internals, "app_status", app_status)
    asked: list[str] = []

    def get_app_handle(name: str) -> Any:
        asked.append(name)
        if len(asked) == 1:
            raise RayServeException("there is no such application")
        return handle

    monkeypatch.setattr(engine.serve, "get_app_handle", get_app_handle)
    monkeypatch.setattr(engine.ray_internals, "object_refs", refuse)
    monkeypatch.setattr(engine, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(engine, "_LOOK_EVERY_S", 0.01)

    async def until_refused(made: Any) -> None:
        while True:  # a look at Serve that had begun before may still find a replica
            await made.wait_for_slot()
            await asyncio.sleep(0.05)

    async def work() -> None:
        made = engine.ServeEngine(EngineOptions(model="nearest-x4", identity="nearest-x4"))
        await made.start()
        await made.wait_for_slot()
        with pytest.raises(ActorUnavailableError):  # as of a replica that died: the unit is tried again
            await anext(made.upscale(OPTIONS, ["a"], [], alone=False))
        with pytest.raises(engine.EngineError, match=r"resshift-nearest-x4 does not run: it is gone$"):
            await until_refused(made)
        await made.close()

    asyncio.run(work())


def test_a_new_key_is_printed_once_with_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    from serve.__main__ import main
    from serve.http.keys import digest

    assert main(["--new-key", "alice"]) == 0
    shown = capsys.readouterr()
    assert digest(shown.out.strip()) in shown.err
    assert shown.out.strip() not in shown.err


def test_keys_are_kept_in_a_file_and_an_open_endpoint_is_refused_before_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from serve import __main__
    from serve.http.keys import digest

    keys = str(tmp_path / "keys.yaml")
    monkeypatch.setattr(__main__, "connect_to_ray", lambda: pytest.fail("Ray was started"))
    everywhere = ["--model", "nearest-x4", "--host", "0.0.0.0"]
    assert __main__.main([*everywhere, "--keys", keys]) == 2
    assert "no such file; --new-key NAME --keys" in capsys.readouterr().err
    assert __main__.main(["--new-key", "alice", "--keys", keys]) == 0
    key = capsys.readouterr().out.strip()
    assert __main__.main(["--new-key", "alice", "--keys", keys]) == 2
    assert "has a key of this name" in capsys.readouterr().err
    assert Path(keys).stat().st_mode & 0o777 == 0o600
    assert __main__.main([*everywhere, "--keys", keys, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert digest(key) in printed
    assert key not in printed
    assert __main__.main(everywhere) == 2
    refused = capsys.readouterr().err
    assert refused.startswith("error: an endpoint at 0.0.0.0 needs API keys: ")
    assert refused.count("\n") == 1
