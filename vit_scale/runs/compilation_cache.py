"""The compilation cache of a run: resuming does not compile again.

A pod compiles a large model for minutes at each start, and is billed for them. jax's persistent
compilation cache in the run's folder avoids that, in a bucket as well: process 0 writes, all read.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

FOLDER = "programs"


@contextlib.contextmanager
def cached(run: pathlib.Path, enabled: bool) -> Iterator[None]:
    """Cache what is compiled inside in the folder `programs` of a run.

    Does nothing on a CPU, which compiles in seconds and for one machine's instruction set, nor
    where the user has set jax's cache to another folder.
    """
    user_folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if user_folder or not enabled or jax.default_backend() == "cpu":
        yield
        return
    jax_cache.set_cache_dir(os.fspath(run / FOLDER))
    jax_cache.reset_cache()  # jax looks for a cache only once, at its first program
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax_cache.reset_cache()
