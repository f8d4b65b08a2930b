"""A fake gcloud for the launcher in the tests' process."""

import pytest

from launch.tpu import gcloud
from tests.helpers.fake_launcher import Table


@pytest.fixture
def table(monkeypatch) -> Table:
    made = Table()
    monkeypatch.setattr(gcloud, "run", made)
    monkeypatch.setenv("USER", "ada")
    return made
