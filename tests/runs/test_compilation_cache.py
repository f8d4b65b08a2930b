"""compilation_cache: a resumed run takes its programs from its own folder."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tests.laws.test_laws import command, settings
from vit_scale import cli
from vit_scale.runs import compilation_cache

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def accelerator(monkeypatch):
    """A backend that claims not to be a CPU, and no cache of the user's."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax_cache.reset_cache()


def events(run, wanted=True) -> list[str]:
    """The events of jax's cache while it compiles one program."""
    seen: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
    jax.clear_caches()
    with compilation_cache.cached(run, wanted):
        assert float(jax.jit(lambda x: 3 * x + 1)(2.0)) == 7.0
    jax.monitoring.clear_event_listeners()
    return [name for name in seen if name in (HIT, MISS)]


def test_what_was_compiled_once_is_found_again(accelerator, tmp_path):
    assert HIT not in events(tmp_path / "run")
    assert list((tmp_path / "run" / compilation_cache.FOLDER).iterdir())
    assert set(events(tmp_path / "run")) == {HIT}
    assert HIT not in events(tmp_path / "another")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_run_keeps_its_training_step(accelerator, quick_compile, cifar, tmp_path):
    fields = settings(cifar, steps=3, eval__final="")
    assert cli.main([*command(tmp_path / "run", **fields), "--quiet"]) == 0
    assert list((tmp_path / "run" / compilation_cache.FOLDER).glob("*train_step*"))


def test_nothing_is_kept_where_it_is_not_wanted(accelerator, tmp_path, monkeypatch):
    assert events(tmp_path, wanted=False) == []
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    jax_cache.reset_cache()
    events(tmp_path)
    assert (tmp_path / "mine").is_dir() and jax.config.jax_compilation_cache_dir
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", None)
    events(tmp_path)  # a CPU
    assert not (tmp_path / compilation_cache.FOLDER).exists()
