"""Compiled programs, kept with their run: going on after a stop does not compile again.

A pod compiles a large model for minutes, at each start, while it is paid for. jax's persistent
cache in the run's folder saves that, also in a bucket: process 0 writes, and all read.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "programs"


@contextlib.contextmanager
def kept(run: pathlib.Path, wanted: bool) -> Iterator[None]:
    """Keep what is compiled in here in the folder `programs` of a run.

    Not on a CPU, which compiles in seconds, and whose programs are of one machine's instructions;
    nor where the user has set jax's cache to another folder.
    """
    given = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if given or not wanted or jax.default_backend() == "cpu":
        yield
        return
    compilation_cache.set_cache_dir(os.fspath(run / FOLDER))
    compilation_cache.reset_cache()  # jax asks once, at its first program, whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
