#!/usr/bin/env bash
# Regenerates constraints.txt: the newest versions that pyproject.toml allows, for every Python it allows.
# Needs uv, which resolves them together. Afterwards run launch/test.sh with each Python.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
{
  cat <<'END'
# Every version that an installation gets, by Python version: 3.11 with jax 0.10, later ones with jax 0.12.
# Made by launch/pin.sh from pyproject.toml; not edited by hand.
END
  uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
    --no-config --no-annotate --no-header --no-emit-index-url --no-emit-find-links
} >constraints.txt.new
mv constraints.txt.new constraints.txt
