#!/usr/bin/env bash
# Creates .venv at the top of the repository: Python, the pinned dependencies, vit_scale itself (editable).
#
#   launch/environment.sh [EXTRA...]     extras of pyproject.toml: docs, gpu, gs, hf, hub, inspect, peers, tfds, tpu, test
#
# Safe to run at every start: it does nothing if .venv is up to date, waits for a concurrent start, and rebuilds an
# environment whose installation was interrupted. Everything it prints goes to standard error.
#   PYTHON=/path/to/python   the interpreter (default: Python 3.12 if there is one, else python3)
#   VENV=/path               the environment's folder, instead of .venv
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
stamp=$venv/vit_scale.stamp            # extras and inputs of a finished installation
unfinished=$venv/vit_scale.unfinished  # exists during an installation, and after an interrupted one

say() { echo "environment: $*" >&2; }
die() { say "$@"; exit 1; }

version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }
modern() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  if [[ -n ${PYTHON:-} ]]; then
    modern "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or later"
    echo "$PYTHON"
    return
  fi
  for candidate in python3.12 python3 python3.13 python3.11; do
    if modern "$candidate"; then
      echo "$candidate"
      return
    fi
  done
}

# Prints what the installation depends on; a moved repository needs new console scripts, hence $root.
inputs() {
  printf '%s\n' "$root" "$(version "$venv/bin/python")"
  cat "$root/pyproject.toml" "$root/constraints.txt"
}

installed_extras() { if [[ -f $stamp ]]; then sed -n 1p "$stamp"; fi; }

right_python() {
  [[ -z ${PYTHON:-} || $(version "$PYTHON") == "$(version "$venv/bin/python")" ]]
}

up_to_date() {
  local extra
  [[ -f $stamp && ! -f $unfinished ]] || return 1
  right_python || return 1
  for extra in "$@"; do
    [[ " $(installed_extras) " == *" $extra "* ]] || return 1
  done
  [[ $(sed -n 2p "$stamp") == "$(inputs | cksum)" ]]
}

# Succeeds if extras can be added to the environment: it is complete, or made by hand, with the right Python.
usable() {
  [[ ! -f $unfinished ]] || return 1
  modern "$venv/bin/python" || return 1
  right_python || return 1
  command -v uv >/dev/null || "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

create() {
  local python
  python=$(find_python)
  if command -v uv >/dev/null; then
    say "creating .venv (uv)"
    uv venv --quiet --clear --python "${python:-3.12}" "$venv" >&2
    return
  fi
  [[ -n $python ]] || die "no Python 3.11 or later found: install one, or uv, or set PYTHON=/path/to/python"
  say "creating .venv (Python $(version "$python"))"
  "$python" -m venv --clear "$venv" >&2 ||
    die "$python cannot create environments: install its venv package (python3-venv), or uv"
}

install() {
  local extras=$1 target=$root
  [[ -z $extras ]] || target="${root}[${extras// /,}]"
  say "installing vit_scale${extras:+ with $extras} (about 1 GB and two minutes the first time)"
  if command -v uv >/dev/null; then
    uv pip install --python "$venv/bin/python" -c "$root/constraints.txt" -e "$target" >&2
  else
    "$venv/bin/python" -m pip install -c "$root/constraints.txt" -e "$target" >&2
  fi || die "the installation failed (see above); rerun the same command to retry"
}

update() {
  local extras
  # A concurrent start may have finished the work meanwhile.
  if up_to_date "$@"; then return; fi
  extras=$(echo "$* $(installed_extras)" | xargs -n 1 | sort -u | xargs)
  usable || create
  rm -f "$stamp"
  touch "$unfinished"
  install "$extras"
  { echo "$extras"; inputs | cksum; } >"$stamp.new"
  mv "$stamp.new" "$stamp"
  rm -f "$unfinished"
}

if up_to_date "$@"; then exit; fi
mkdir -p "$root/.cache"
exec 9>"$root/.cache/environment.lock"
if command -v flock >/dev/null && ! flock -n 9; then
  say "waiting for a concurrent installation"
  flock 9
fi
update "$@"
