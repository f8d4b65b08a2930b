#!/usr/bin/env bash
# Installs libtpu, the TPU compiler, in .venv/libtpu, for `vit-scale plan` on a machine without a TPU. Linux only.
# Does nothing if it is up to date.
#
# Only plan's processes use this folder: with libtpu in .venv itself, every training on a CPU would first search for
# a TPU, and end with a stack trace when it is stopped.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
folder=$venv/libtpu
[[ $(uname -s) == Linux ]] || { echo "compiler: libtpu exists for Linux only; its tests are skipped" >&2; exit; }
"$root/launch/environment.sh"

wanted() { cksum <"$root/constraints.txt"; }
if [[ -f $folder/stamp && $(<"$folder/stamp") == "$(wanted)" ]]; then exit; fi

echo "compiler: installing libtpu (about 700 MB)" >&2
rm -rf "$folder" "$folder.new"
options=(--no-deps -c "$root/constraints.txt" --target "$folder.new" libtpu)
if command -v uv >/dev/null; then
  uv pip install --python "$venv/bin/python" "${options[@]}" >&2
else
  "$venv/bin/python" -m pip install "${options[@]}" >&2
fi || { echo "compiler: libtpu was not installed (see above); rerun the same command to retry" >&2; exit 1; }
wanted >"$folder.new/stamp"
mv "$folder.new" "$folder"
