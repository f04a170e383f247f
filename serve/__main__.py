"""Start the endpoint on this machine, or write its configuration.

    python -m serve                                         tiny-x4 at http://127.0.0.1:8000
    python -m serve --model runs/mine/model --port 9000
    python -m serve --model tiny-x4 --model nearest-x4 --jobs photos:upscaled
    python -m serve --replicas 0:4 --ongoing 16             up to four GPUs, sixteen pictures at once on each
    python -m serve --config serve/config.yaml              a configuration, on this machine
    python -m serve --print-config > my.yaml                for `serve run my.yaml` and `serve deploy my.yaml`
    python -m serve --new-key alice --keys keys.yaml        an API key, once; its digest goes to keys.yaml
    python -m serve --keys keys.yaml --host 0.0.0.0         for other machines, with keys alone

`RAY_ADDRESS` joins a cluster; without it one is started here. Ctrl-C ends it after what is being worked on.

Exit codes: 0 complete, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from pipelines.command import Exit, UsageError, add_model, connect_to_ray, min_max, model_of, parser, run


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    add_model(options, action="append")
    options.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; another needs keys)"
    )
    options.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    options.add_argument(
        "--replicas",
        metavar="MIN:MAX",
        help="replicas of each model (default: 1 up to what the cluster can have); 0:MAX: none while nobody "
        "asks",
    )
    options.add_argument(
        "--ongoing",
        type=int,
        default=2,
        metavar="N",
        help="pictures at a time at a replica (default 2; for a GPU 16: computed together)",
    )
    options.add_argument(
        "--jobs", metavar="SRC:DST", help="allow bulk jobs from inside SRC to inside DST (plain paths)"
    )
    options.add_argument(
        "--faces", metavar="FILE", help="face detector (YuNet's ONNX file), so that faces can be asked for"
    )
    options.add_argument("--config", metavar="FILE", help="take all of it from a configuration")
    options.add_argument(
        "--keys", metavar="FILE", help="API keys, as --new-key writes them; read when the endpoint starts"
    )
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--print-config", action="store_true", help="write the configuration and end")
    mode.add_argument("--new-key", metavar="NAME", help="make an API key, add it to --keys, and end")
    return options


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration that the flags describe, as `serve run` reads it.

    Raises:
        UsageError: A flag cannot be what it is.
        WeightsError: No such model.
    """
    from pipelines.bulk.worker import describe_model
    from resshift.faces.detect import yunet
    from serve.replica import app_name

    low, high = (1, None) if options.replicas is None else min_max("--replicas", options.replicas, least=0)
    models: list[str] = options.model or ["tiny-x4"]
    if len(models) > 1 and (options.preset or options.first_stage):
        raise UsageError("--preset and --first-stage are of one --model: write MODEL#preset=NAME for several")
    models = [model_of(name, options) for name in models]
    if options.ongoing < 1:
        raise UsageError(f"--ongoing must be at least 1, got {options.ongoing}")
    if not 1 <= options.port <= 65535:
        raise UsageError(f"--port must lie in [1, 65535], got {options.port}")
    args: dict[str, Any] = {"models": models, "limits": {"ongoing": options.ongoing}}
    if high is not None:
        args["jobs"] = {"replicas": high}
    if low == 0:
        args["sleeping"] = models
    if options.faces is not None:
        yunet(options.faces)  # refused here if it is none
        args["faces"] = options.faces if "://" in options.faces else os.path.abspath(options.faces)
    if options.jobs is not None:
        source, _, target = options.jobs.partition(":")
        if not source or not target:
            raise UsageError(f"--jobs must be SRC:DST, got {options.jobs!r}")
        args["jobs"] = args.get("jobs", {}) | {
            "sources": [os.path.abspath(source)],
            "targets": [os.path.abspath(target)],
        }
    endpoint = {"name": "resshift", "route_prefix": "/", "import_path": "serve.app:application", "args": args}
    applications = [
        {
            "name": app_name(describe_model(name).identity),
            "route_prefix": None,
            "import_path": "serve.replica:application",
            "args": {"model": name, "low": low, "high": high, "ongoing": options.ongoing},
        }
        for name in models
    ]
    http = {"host": options.host, "port": options.port}
    return {
        "proxy_location": "EveryNode",
        "http_options": http,
        "applications": [*applications, endpoint],
    }


def endpoint_args(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the endpoint in a configuration; empty, for none, if it has none."""
    for one in config.get("applications") or []:
        if one.get("import_path") == "serve.app:application":
            return one.setdefault("args", {})
    return {}


def read_keys(path: str, may_be_new: bool = False) -> list[dict[str, Any]]:
    """Return the entries of a file of keys.

    Raises:
        UsageError: It cannot be read, or holds something else.
    """
    import yaml
    from pydantic import TypeAdapter, ValidationError

    from serve.settings import KeySettings

    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file) or []
        TypeAdapter(list[KeySettings]).validate_python(entries)
    except FileNotFoundError:
        if may_be_new:
            return []
        raise UsageError(f"--keys {path}: no such file; --new-key NAME --keys {path} makes it") from None
    except OSError as error:
        raise UsageError(f"--keys {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValidationError) as error:
        told = str(error).splitlines()[-1].strip()
        raise UsageError(f"--keys {path} must hold lines of --new-key: {told}") from None
    return entries


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def check_open(config: dict[str, Any]) -> None:
    """Refuse an endpoint without keys that others could reach, before Ray starts for it.

    Raises:
        UsageError: It has none.
    """
    from serve.http.keys import is_loopback

    host = (config.get("http_options") or {}).get("host", "127.0.0.1")
    args = endpoint_args(config)
    if args and not args.get("keys") and not is_loopback(str(host)):
        raise UsageError(
            f"an endpoint at {host} needs API keys: python -m serve --new-key NAME --keys keys.yaml makes "
            "one, and --keys keys.yaml uses them"
        )


def check_address(config: dict[str, Any]) -> None:
    """Refuse an address that cannot be had, before a cluster is started for it: the proxy would try three
    times and say so in tracebacks.

    Raises:
        UsageError: Somebody listens there already, or it is not an address of this machine.
    """
    from ray.serve.schema import ServeDeploySchema

    http = ServeDeploySchema.model_validate(config).http_options
    try:
        # As the proxy binds: a port that was in use a moment ago is free.
        with socket.create_server((http.host, http.port)):
            pass
    except OSError as error:
        why = str(error.strerror).split(" (", 1)[0]  # Python adds the address
        raise UsageError(
            f"cannot listen at {http.host}:{http.port} ({why}): give another --port or --host"
        ) from None


def start(config: dict[str, Any]) -> str:
    """Deploy a configuration on the connected Ray and return the address of the endpoint when it answers.

    Raises:
        UsageError: Serve runs on this cluster already, for a bulk job, and listens nowhere.
    """
    import ray
    from ray import serve
    from ray.exceptions import ActorAlreadyExistsError
    from ray.serve.schema import LoggingConfig, ServeDeploySchema

    # Checked by Serve's own schema, and deployed by name: every deployment can be imported wherever this
    # package is installed.
    schema = ServeDeploySchema.model_validate(config)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    http = schema.http_options
    with contextlib.suppress(ActorAlreadyExistsError):  # a bulk job that starts at this moment was faster
        serve.start(
            proxy_location=schema.proxy_location,
            http_options={"host": http.host, "port": http.port},
            controller_options=schema.controller_options,
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
    if schema.proxy_location != "Disabled" and not serve.status().proxies:  # Serve keeps the first settings
        raise UsageError(
            "a bulk job has started Serve on this cluster, without an address to listen on: start the "
            "endpoint before bulk jobs, which share its replicas, or after they have ended"
        )
    targets: list[serve.RunTarget] = []
    for one in schema.applications:
        build = getattr(_module(one.import_path.split(":")[0]), one.import_path.split(":")[1])
        targets.append(serve.RunTarget(target=build(one.args), name=one.name, route_prefix=one.route_prefix))
    serve.run_many(targets)
    assert ray.is_initialized()
    return f"http://{http.host}:{http.port}"


def _module(name: str) -> Any:
    import importlib

    return importlib.import_module(name)


def command(options: argparse.Namespace) -> Exit:
    """Run the command."""
    import yaml

    from serve.http.keys import digest, new_key

    if options.new_key is not None:
        key = new_key()
        entry = f"- {{name: {json.dumps(options.new_key)}, sha256: {digest(key)}}}\n"
        if options.keys is None:
            sys.stderr.write(f"The key is shown once. Under args.keys of the endpoint:\n  {entry}")
        else:
            if any(one["name"] == options.new_key for one in read_keys(options.keys, may_be_new=True)):
                raise UsageError(f"--new-key {options.new_key}: {options.keys} has a key of this name")
            with open(options.keys, "a", encoding="utf-8", opener=_private) as file:
                file.write(entry)
            sys.stderr.write(f"The key is shown once; {options.keys} has its digest.\n")
        sys.stdout.write(f"{key}\n")
        return Exit.COMPLETE
    config: dict[str, Any]
    if options.config is not None:
        try:
            with open(options.config, encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except OSError as error:
            raise UsageError(f"--config {options.config}: {error.strerror}") from None
    else:
        config = configuration(options)
    if options.keys is not None:
        endpoint_args(config)["keys"] = read_keys(options.keys)
    if options.print_config:
        sys.stdout.write(yaml.safe_dump(config, sort_keys=False))
        return Exit.COMPLETE
    check_open(config)
    if not os.environ.get("RAY_ADDRESS"):  # else the address is that of the cluster's head
        check_address(config)
    try:
        connect_to_ray()
        address = start(config)
    except KeyboardInterrupt:
        sys.stderr.write("stopped before the endpoint answered\n")
        return Exit.FAILED
    sys.stdout.write(f"{address}\n")
    sys.stdout.flush()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    from ray import serve

    serve.shutdown()
    return Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(command, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
