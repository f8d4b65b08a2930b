#!/usr/bin/env bash
# Installs, then runs the tests; needs no accelerator. Arguments go to pytest:
#
#   launch/test.sh                       everything but the slow tests, on all cores
#   launch/test.sh --quick               what a change needs first: lint, types, the direction of imports, configs,
#                                        ViTs, optimizers, and a run that is stopped and resumed
#   launch/test.sh -n 0 tests/models/test_vit.py -k parameters
#   launch/test.sh -m slow               the slow ones (they use the package registry)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/launch/environment.sh" test
cd "$root"
if [[ ${1:-} == --quick ]]; then
  shift
  set -- tests/repository/test_style.py tests/repository/test_architecture.py tests/test_config.py tests/configs \
    tests/models/test_vit.py tests/models/test_position_embeddings.py tests/models/test_flops.py tests/training/test_optimizer.py \
    "tests/laws/test_laws.py::test_stopped_and_resumed_is_bit_for_bit_the_undisturbed_run[after-it]" "$@"
else
  launch/compiler.sh  # for plan's tests, which compile for TPUs
fi
# The tests of a file run in one process: they share fixtures. tests/conftest.py puts the longest files first.
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder "$@"
