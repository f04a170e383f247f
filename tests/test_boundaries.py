"""Dependencies point one way, and the library draws no global random numbers."""

from __future__ import annotations

import ast
import functools
import gc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The packages that each package may import from, besides itself.
ALLOWED = {
    "resshift": set[str](),
    "pipelines": {"resshift"},
    "serve": {"resshift", "pipelines"},
    "jobs": {"resshift", "pipelines", "serve"},
}
ROOMS = set(ALLOWED) | {"tests", "benchmarks"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    # Before 3.11.8, Python counts the depth of the tree that it makes in a variable of the process. What the
    # collector finalises meanwhile may parse, too, as every traceback does: "AST constructor recursion depth
    # mismatch" (python/cpython#106905).
    gc.disable()
    try:
        return tuple(ast.walk(ast.parse(path.read_text())))
    finally:
        gc.enable()


def imports(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


@pytest.mark.parametrize("room", ALLOWED)
def test_dependencies_point_one_way(room: str) -> None:
    forbidden = ROOMS - ALLOWED[room] - {room}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(room)
        for name in imports(path)
        if name.split(".")[0] in forbidden
    ]
    assert sources(room)
    assert found == []


def test_the_method_never_imports_ray() -> None:
    found = [
        f"{path.name}: {name}"
        for path in sources("resshift")
        for name in imports(path)
        if name.split(".")[0] == "ray"
    ]
    assert found == []


# Variables that Ray's documentation names.
RAY_VARIABLES = {
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_FAKE_CLUSTER",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH",
    "RAY_TMPDIR",
    "RAY_USAGE_STATS_ENABLED",
}


def private_names_of_ray(path: Path) -> Iterator[str]:
    """Yield what a module uses of Ray with a leading underscore: imports, attributes of what may be Ray's,
    arguments; and what strings name of it, as loggers, actors and variables of the environment.
    """
    if not re.search(r"\bray\b|RAY_|AUTOSCALER_|SERVE_", path.read_text()):
        return
    own = {node.name for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    uses_ray = any(name.split(".")[0] == "ray" for name in imports(path))
    for node in nodes(path):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}.{alias.name}".strip(".") for alias in node.names):
                if re.search(r"^ray\b.*\._", name):
                    yield name
        elif isinstance(node, ast.Attribute) and uses_ray and re.match(r"_[a-z]", node.attr):
            public = own | {"_replace", "_asdict", "_fields"}  # the last three are those of named tuples
            if node.attr not in public and ast.unparse(node.value) not in ("self", "cls", "os"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from (one.arg for one in node.keywords if one.arg and one.arg.startswith("_"))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            for name in re.findall(r"\bray(?:\.\w+)*\._\w+|SERVE_(?:CONTROLLER|REPLICA)\w*", node.value):
                yield name
            for name in re.findall(r"\b(?:RAY|AUTOSCALER)_\w+", node.value):
                if name not in RAY_VARIABLES:
                    yield name


def test_private_names_of_ray_stand_in_one_module() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for room in (*ALLOWED, "benchmarks", "deploy")
        for path in sources(room)
        if path != ROOT / "pipelines" / "cluster" / "ray_internals.py"
        for name in private_names_of_ray(path)
    ]
    assert found == []


@pytest.mark.slow
def test_the_method_works_with_ray_out_of_reach() -> None:
    """Importing every module of the library in a process where `import ray` fails."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sources("resshift")
    ]
    code = "import sys; sys.modules['ray'] = None\n" + "\n".join(f"import {name}" for name in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


GLOBAL_RANDOM = {
    "random",
    "np.random.seed",
    "np.random.rand",
    "np.random.randn",
    "np.random.randint",
    "np.random.uniform",
}
TORCH_DRAWS = {"torch.randn", "torch.rand", "torch.randint", "torch.randperm"}


# What computes nothing: the driver of a bulk job, decoders, and processes of the endpoint without a model.
COMPUTES_NOTHING = (
    "resshift.models",
    "resshift.config",
    "resshift.networks.config",
    "resshift.images.sandbox",
    "pipelines.bulk.job",
    "pipelines.bulk.request",
    "serve.app",
    "serve.jobs",
)
MAKES_PAIRS = "pipelines.pairs.dataset"
MAKES_PICTURES = (
    "resshift.upscaler",
    *(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for folder in ("tiles", "networks")
        for path in sources(f"resshift/{folder}")
    ),
)


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Return the modules that a process has loaded after it has imported each of those above, in turn. What
    is not there at last was loaded by none of them. Pairs have a process of their own.
    """
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(name, *sys.modules)"
    )
    found: dict[str, set[str]] = {}
    for names in (dict.fromkeys((*COMPUTES_NOTHING, *MAKES_PICTURES)), (MAKES_PAIRS,)):
        command = [sys.executable, "-c", program, *names]
        told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        found |= {line.split()[0]: set(line.split()[1:]) for line in told.splitlines()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", COMPUTES_NOTHING)
def test_what_computes_nothing_does_not_import_torch(module: str, loaded: dict[str, set[str]]) -> None:
    """It would take half a gigabyte and three seconds."""
    assert loaded[module] & {"torch", "torchvision"} == set()


@pytest.mark.slow
def test_making_pairs_needs_no_library_of_networks(loaded: dict[str, set[str]]) -> None:
    """torchvision brings the compiler of torch: seconds of every process that only reads and degrades
    photos.
    """
    assert "torch" in loaded[MAKES_PAIRS]
    assert loaded[MAKES_PAIRS] & {"torchvision", "torch._dynamo", "lpips"} == set()


@pytest.mark.slow
def test_making_pictures_imports_nothing_that_trains(loaded: dict[str, set[str]]) -> None:
    """A replica, a demo and a notebook need no optimiser, loss or sharding."""
    found = loaded[MAKES_PICTURES[-1]]
    assert len(MAKES_PICTURES) > 10
    assert "resshift.tiles.chain" in found
    assert [name for name in found if name.startswith("resshift.training")] == []
    assert found & {"torchvision", "torch._dynamo", "lpips"} == set(), "two seconds of every command"


@pytest.mark.slow
def test_making_pictures_brings_no_client_of_buckets() -> None:
    """In a process of its own: what computes nothing may have one. It takes half a second."""
    program = "import sys; from resshift import Upscaler; assert Upscaler; print('s3fs' in sys.modules)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"


@pytest.mark.slow
def test_a_bulk_job_runs_without_torch_in_its_driver(tmp_path: Path) -> None:
    """Not only what it imports at first: what it does, up to where Ray begins. The speed that a plan measures
    is that of a replica, which has torch.
    """
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    program = (
        "import runpy, sys; from pipelines.bulk import probe; probe.replica_speed = lambda *_: (1.0, ''); "
        "sys.argv[0] = 'upscale.py'; job = runpy.run_path('jobs/upscale.py')['main']; "
        "code = job(sys.argv[1:]); print(code, [m for m in ('torch', 'torchvision') if m in "
        "sys.modules])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "in"), str(tmp_path / "out"), "--plan"]
    told = (
        subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        .stdout.strip()
        .splitlines()
    )
    assert told[-1] == "0 []"


@pytest.mark.parametrize("room", ["resshift", "pipelines"])
def test_no_global_random_numbers(room: str) -> None:
    found: list[str] = []
    for path in sources(room):
        found += [f"{path.name}: import random" for name in imports(path) if name == "random"]
        for node in nodes(path):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                has_generator = any(keyword.arg == "generator" for keyword in node.keywords)
                if name in GLOBAL_RANDOM or (name in TORCH_DRAWS and not has_generator):
                    found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == []


def test_bgr_is_spoken_of_in_one_module_only() -> None:
    speakers = {
        path.name
        for room in ("resshift", "pipelines", "jobs")
        for path in sources(room)
        if "BGR" in path.read_text()
    }
    assert speakers <= {"samples.py"}


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc", "base"])
def test_no_attic(name: str) -> None:
    assert [path for room in ALLOWED for path in sources(room) if path.stem == name] == []


def test_jobs_shadow_no_installed_module() -> None:
    """`python jobs/x.py` puts jobs/ first on sys.path; Ray imports a great deal by top-level name."""
    needed = {
        "ray",
        "torch",
        "numpy",
        "pyarrow",
        "PIL",
        "cv2",
        "rich",
        "pydantic",
        "s3fs",
        "fsspec",
        "einops",
        "lpips",
    }
    assert {path.stem for path in sources("jobs")} & (needed | set(sys.stdlib_module_names)) == set()
