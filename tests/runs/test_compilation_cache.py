"""compilation_cache: a resumed run loads its compiled programs from its own folder."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from tests.laws.test_laws import command, settings
from vit_scale import cli
from vit_scale.runs import compilation_cache

HIT, MISS = "/jax/compilation_cache/cache_hits", "/jax/compilation_cache/cache_misses"


@pytest.fixture
def accelerator(monkeypatch):
    """A backend that claims not to be a CPU, and no compilation cache of the user's."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    jax_cache.reset_cache()


def events(run, enabled=True) -> list[str]:
    """Return the events of jax's compilation cache while it compiles one program."""
    seen: list[str] = []
    jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
    jax.clear_caches()
    with compilation_cache.cached(run, enabled):
        assert float(jax.jit(lambda x: 3 * x + 1)(2.0)) == 7.0
    jax.monitoring.clear_event_listeners()
    return [name for name in seen if name in (HIT, MISS)]


def test_compiled_programs_are_cached_per_run(accelerator, tmp_path):
    assert HIT not in events(tmp_path / "run")
    assert list((tmp_path / "run" / compilation_cache.FOLDER).iterdir())
    assert set(events(tmp_path / "run")) == {HIT}
    assert HIT not in events(tmp_path / "another")
    assert jax.config.jax_compilation_cache_dir is None


def test_a_run_caches_its_train_step(accelerator, cifar, tmp_path):
    fields = settings(cifar, steps=3, eval__final="")
    assert cli.main([*command(tmp_path / "run", **fields), "--quiet"]) == 0
    assert list((tmp_path / "run" / compilation_cache.FOLDER).glob("*train_step*"))


def test_no_cache_if_disabled_or_configured_or_on_a_cpu(accelerator, tmp_path, monkeypatch):
    assert events(tmp_path, enabled=False) == []
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    jax_cache.reset_cache()
    events(tmp_path)
    assert (tmp_path / "mine").is_dir() and jax.config.jax_compilation_cache_dir
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", None)
    events(tmp_path)  # a CPU
    assert not (tmp_path / compilation_cache.FOLDER).exists()
