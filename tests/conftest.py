"""What every test may rely on: the CPU, no network, and small image sets that a model can learn.

The environment is set before anything imports jax, and is inherited by every process a test starts.
"""

import gc
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from tests.helpers.program_cache import ProgramCache

ROOT = pathlib.Path(__file__).resolve().parent.parent

PROGRAMS = ProgramCache(ROOT / ".cache")

# XLA's older code generator for the CPU compiles in two thirds of the time; jax 0.12 has none. With
# as many processes as cores, compiling in parallel gains nothing.
FASTER_XLA = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
OLDER_XLA = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12)

# The files of tests that take longest, the longest first.
LONGEST = (
    "laws/test_mesh.py",
    "laws/test_laws.py",
    "laws/test_switches.py",
    "laws/test_convnets.py",
    "storage/test_bucket.py",
    "laws/test_soak.py",
    "launch/test_real.py",
    "cli/test_bad_input.py",
    "training/test_stages.py",
    "data/test_changed.py",
    "plan/test_compile.py",
    "cli/test_cli.py",
    "repository/test_style.py",
)

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(PROGRAMS.session),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # XLA compiles in a quarter of the time. The programs are slower, and may round otherwise.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "XLA_FLAGS": FASTER_XLA if OLDER_XLA else "",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "120",
}
# Tracing allocates so much that a tenth of the time would be the garbage collector's.
gc.set_threshold(20_000, 20, 20)

for name in ("WANDB_API_KEY", "JAX_NUM_CPU_DEVICES", "JAX_ENABLE_X64"):
    os.environ.pop(name, None)


def pytest_configure():
    PROGRAMS.prune()


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores, since the launcher's tests mostly wait."""
    return min((os.cpu_count() or 1) + 1, 8)


def pytest_unconfigure():
    PROGRAMS.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that no worker is left with one at the end."""
    rank = {ROOT / "tests" / file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def signals() -> None:
    """Let processes that the tests start receive SIGUSR2, which a training here has blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})


@pytest.fixture(scope="module", autouse=True)
def shared_programs() -> Iterator[None]:
    """Exchange compiled programs with the other workers and with later runs, file by file."""
    PROGRAMS.take()
    yield
    PROGRAMS.give()


@pytest.fixture(scope="module")
def default_compile() -> Iterator[None]:
    """Let XLA compile as it does for users, also in processes that a test starts: for goldens."""
    import jax
    from jax._src import compiler

    get_options = compiler.get_compile_options

    def default_options(*args, env_options_overrides=None, **named):
        overrides = {"xla_cpu_use_fusion_emitters": True, **(env_options_overrides or {})}
        return get_options(*args, env_options_overrides=overrides, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
        jax.config.update("jax_disable_most_optimizations", False)
        if OLDER_XLA:
            patch.delenv("XLA_FLAGS")
            patch.setattr(compiler, "get_compile_options", default_options)
        yield
        jax.config.update("jax_disable_most_optimizations", True)


Cli = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run_cli(tmp_path) -> Cli:
    """run_cli("train", "--config", NAME, ...) is `vit-scale` as typed by a user: a new process.

    It starts in the test's own folder; its output comes back as text. `env` adds variables.
    """

    def run(
        *arguments, timeout: float = 300, env=None, cwd=tmp_path
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "vit_scale.cli", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def colour_coded(
    count: int, classes: int, size: int, seed: int
) -> Iterator[tuple[np.ndarray, int]]:
    """`count` pairs (uint8 [size, size, 3], label): noise around the colour of the class, in turn.

    A model that learns anything tells them apart.
    """
    palette = np.random.RandomState(0).randint(32, 224, (classes, 3))
    draw = np.random.RandomState(seed)
    for index in range(count):
        noise = draw.randint(-32, 32, (size, size, 3))
        yield (palette[index % classes] + noise).astype(np.uint8), index % classes


@pytest.fixture(scope="session")
def cifar(tmp_path_factory) -> pathlib.Path:
    """A folder with `cifar-10-batches-bin`: the official layout and sizes, colour-coded images."""
    top = tmp_path_factory.mktemp("cifar")
    folder = top / "cifar-10-batches-bin"
    folder.mkdir()
    first = folder / "data_batch_1.bin"
    for file, seed in ((first, 1), (folder / "test_batch.bin", 2)):
        # The 500 different images of a file, 20 times: 10,000 take seconds to draw.
        rows = [
            np.append(np.uint8(label), image.transpose(2, 0, 1).ravel())
            for image, label in colour_coded(500, 10, 32, seed)
        ]
        file.write_bytes(np.stack(rows).astype(np.uint8).tobytes() * 20)
    for number in range(2, 6):
        os.link(first, folder / f"data_batch_{number}.bin")
    return top


@pytest.fixture(scope="session")
def jpegs(tmp_path_factory) -> pathlib.Path:
    """`train/<class>/*.jpg` (3 classes x 16) and `val/<class>/*.jpg` (3 x 4) of 40 x 40 pixels."""
    top = tmp_path_factory.mktemp("jpegs")
    for split, count, seed in (("train", 48, 1), ("val", 12, 2)):
        for index, (image, label) in enumerate(colour_coded(count, 3, 40, seed)):
            file = top / split / f"class_{label}" / f"{index:03}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file, quality=95)
    return top


@pytest.fixture(scope="session")
def bucket(tmp_path_factory) -> Iterator[str]:
    """The address of an empty bucket, "gs://...", which every process that a test starts reaches.

    What can't be in it is kept in a folder of the session, never in the home of who tests.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests/helpers/bucket.py"), str(port), "bucket"]
    log = tmp_path_factory.mktemp("bucket") / "log"
    with pytest.MonkeyPatch.context() as patch, log.open("w") as output:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://localhost:{port}")
        patch.setenv("NO_GCE_CHECK", "true")  # no search for a cloud's credentials
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_for(port, server)
            yield "gs://bucket"
        finally:
            server.kill()
            server.wait()


def wait_for(port: int, server: subprocess.Popen) -> None:
    """Return once `server` answers on `port`."""
    patience = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("localhost", port)).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < patience, "no bucket: see its log"
            time.sleep(0.05)
