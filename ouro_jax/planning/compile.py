"""Compiles requests in child processes, several at a time, and keeps what came of them.

The compiler may abort its process, and it holds gigabytes: a child's death is a result here.
"""

import ast
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import ouro_jax
from ouro_jax.errors import ConfigError, RunError
from ouro_jax.planning.programs import Request
from ouro_jax.planning.topologies import environment

# The largest program tried (2 slices of v5p) took 2.5 GB of host memory and 190 s.
CHILD_BYTES = 3 * 2**30
TIMEOUT_SECONDS = 1800
# The code that decides what is compiled; a result is of this code and of no other.
SOURCES = (
    "model/*.py", "objectives/*.py", "data/batch.py", "parallel/mesh.py", "parallel/attention.py",
    "training/state.py", "training/step.py", "training/guard.py", "training/optimizer.py",
    "inference/slots.py", "inference/sampling.py", "planning/programs.py",
)  # fmt: skip
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax")
REMATERIALIZED = "Involuntary full rematerialization"

Child = Sequence[str]
CHILD: Child = (sys.executable, "-m", "ouro_jax.planning.programs")


def compile_all(
    requests: Sequence[Request], cache: Path, child: Child = CHILD
) -> Iterator[tuple[Request, dict[str, Any]]]:
    """Yields each distinct request with its result as they end; those in `cache` come first.

    A result is what `compile_request` returns, or `fits` false with the reason if the child died;
    `warnings` counts what the compiler complained of. Raises ConfigError where the layout does
    not match the model, RunError where the child failed for another reason.
    """
    missing = []
    for request in dict.fromkeys(requests):
        stored = folder_of(request, cache) / "result.json"
        if stored.is_file():
            yield request, json.loads(stored.read_text())
        else:
            missing.append(request)
    pool = ThreadPoolExecutor(_workers())
    try:
        waiting = {pool.submit(_compile, request, cache, child): request for request in missing}
        for future in as_completed(waiting):
            yield waiting[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def program_text(request: Request, cache: Path) -> str:
    """The text of a compiled program, from the cache."""
    with gzip.open(folder_of(request, cache) / "hlo.txt.gz", "rt") as file:
        return file.read()


def folder_of(request: Request, cache: Path) -> Path:
    """Where the result of `request` lies, or will lie: by a hash of all that decides it."""
    settings = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    text = repr((request, _code(), versions(), settings))
    return cache / hashlib.sha256(text.encode()).hexdigest()[:24]


def _compile(request: Request, cache: Path, child: Child) -> dict[str, Any]:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        folder = Path(scratch) / "result"
        folder.mkdir()
        result = _run_child(request, folder, child)
        if "config_error" in result:
            raise ConfigError(result["config_error"])
        (folder / "result.json").write_text(json.dumps(result))
        final = folder_of(request, cache)
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    return result


def _run_child(request: Request, folder: Path, child: Child) -> dict[str, Any]:
    package = str(Path(ouro_jax.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [*child, str(folder)], input=pickle.dumps(request), capture_output=True,
            timeout=TIMEOUT_SECONDS,
            env={**os.environ, **environment(request.topology), "PYTHONPATH": path},
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RunError(
            f"{request.topology.name}: the compiler has not ended within {TIMEOUT_SECONDS} s; "
            "try another layout."
        ) from error
    complaints = done.stderr.decode(errors="replace")
    if done.returncode in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGILL):
        name = signal.Signals(-done.returncode).name
        reason = f"the compiler aborted ({name}): {_last_lines(complaints)}"
        result = {"fits": False, "reason": reason, "peak_bytes": None}
    elif done.returncode:
        hint = " It was killed, perhaps for want of memory." if done.returncode == -9 else ""
        raise RunError(
            f"{request.topology.name}: compiling ended with code {done.returncode}.{hint}\n"
            f"{_last_lines(complaints, 12)}"
        )
    else:
        result = json.loads((folder / "result.json").read_text())
    return result | {"warnings": complaints.count(REMATERIALIZED)}


def _last_lines(text: str, count: int = 4) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


def _workers() -> int:
    """Compilers at once: as many as cores, and as the memory that is free has room for."""
    table = Path("/proc/meminfo").read_text()
    free = 1024 * int(table.split("MemAvailable:")[1].split()[0])
    return max(1, min(len(os.sched_getaffinity(0)), free // CHILD_BYTES))


@functools.cache
def _code() -> str:
    """`SOURCES` as they are parsed: comments do not count."""
    package = Path(ouro_jax.__file__).parent
    files = [file for pattern in SOURCES for file in sorted(package.glob(pattern))]
    return "".join(ast.dump(ast.parse(file.read_text())) for file in files)


def versions() -> dict[str, str | None]:
    """What compiles, by package; None: it is not installed."""
    found = {package.name: package.version for package in importlib.metadata.distributions()}
    return {name: found.get(name) for name in COMPILERS}
