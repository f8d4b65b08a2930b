"""The package itself: its version, its public names, its type information."""

import importlib.metadata
import subprocess
import sys

import vit_scale


def test_version_is_that_of_the_distribution():
    assert vit_scale.__version__ == importlib.metadata.version("vit_scale")


def test_dir_lists_public_names_only_and_each_is_there():
    assert dir(vit_scale) == sorted(vit_scale.__all__)
    assert {name for name in dir(vit_scale) if name.startswith("_")} == {"__version__"}
    assert all(getattr(vit_scale, name) for name in dir(vit_scale))


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(vit_scale, "importlib_of_nothing")


def test_import_does_not_wait_for_jax():
    program = "import sys, vit_scale; vit_scale.__version__; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
