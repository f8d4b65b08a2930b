#!/usr/bin/env bash
# Trains on a Cloud TPU slice: creates or adopts it, starts every worker, watches the run, recovers, deletes the slice.
#
#   launch/tpu_vm.sh --config vit_small_cifar --name vit --type v4-32 --zone us-central2-b --spot
#   launch/tpu_vm.sh --help
#
# Needs Python 3.10 or later, and gcloud. Rerun the same command to resume. The implementation is in launch/tpu.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
  if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    exec "$python" -I "$here/tpu" "$@"
  fi
done
echo "tpu_vm: no Python 3.10 or later found: install one, or set PYTHON=/path/to/python" >&2
exit 64
