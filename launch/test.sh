#!/usr/bin/env bash
# Installs, then runs every test; needs no accelerator. Arguments go to pytest:
#
#   launch/test.sh                       everything but the slow tests, on all cores (up to 8)
#   launch/test.sh -n 0 tests/models/test_vit.py -k parameters
#   launch/test.sh -m slow               the slow ones (they reach the package registry)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/environment.sh" test
"$root/launch/compiler.sh"  # plan's tests compile for TPUs; only they see it
cd "$root"
# A file's tests stay in one process: they share fixtures and compiled programs.
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile "$@"
