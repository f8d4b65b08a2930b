"""The images that the tests of storage read from a bucket."""

import pathlib

import pytest

from tests.helpers.objects import upload


@pytest.fixture(scope="module")
def images(bucket, jpegs) -> pathlib.Path:
    """The `jpegs` in the bucket."""
    return upload(jpegs, f"{bucket}/jpegs")
