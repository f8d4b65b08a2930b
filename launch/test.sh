#!/usr/bin/env bash
# Installs, then runs the tests; needs no accelerator. Arguments go to pytest:
#
#   launch/test.sh                       everything but the slow tests, on all cores (up to 8)
#   launch/test.sh -n 0 tests/models/test_vit.py -k parameters
#   launch/test.sh -m slow               the slow ones (they use the package registry)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/environment.sh" test
"$root/launch/compiler.sh"  # for plan's tests, which compile for TPUs
cd "$root"
# The tests of a file run in one process: they share fixtures and compiled programs.
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist loadfile "$@"
