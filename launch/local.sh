#!/usr/bin/env bash
# Trains on this machine, with whatever it has: CPU, GPUs or a TPU VM. The whole path from a fresh clone.
set -euo pipefail

usage() {
  cat <<'END'
launch/local.sh --config NAME [FLAG...]

Makes or updates .venv, then runs `vit-scale train` with every flag given here. Run the same command again
to resume. The exit code is the trainer's: 0 done, 1 failed, 2 usage, 42 stopped but resumable, 43 diverged.

  --config quickstart             a configuration of configs/, a path, or NAME:ARGUMENT
  --workdir runs/quickstart       where the run is kept
  --config.optim.lr=3e-4          overrides any field of configs/base.py
  --hosts 4 --devices 2           a pod on this machine: 4 processes with 2 virtual CPU devices each

  ACCELERATOR=cpu|gpu|tpu         what to install JAX for, where the guess is wrong
  PYTHON=/path/to/python          the interpreter of a new .venv
END
}

# Prints the extra of pyproject.toml that this machine's accelerator needs, or nothing.
accelerator() {
  if [[ -n ${ACCELERATOR:-} ]]; then
    case $ACCELERATOR in
      cpu) ;;
      gpu | tpu) echo "$ACCELERATOR" ;;
      *) echo "local: ACCELERATOR=$ACCELERATOR is none of cpu, gpu, tpu" >&2; return 2 ;;
    esac
  elif [[ -e /dev/accel0 || -e /dev/vfio/0 ]]; then
    echo tpu
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo gpu
  fi
}

case ${1:-} in
  "") usage >&2; exit 2 ;;
  -h | --help) usage; exit ;;
esac

hosts="" devices=1 flags=()
while (($#)); do
  case $1 in
    --hosts) hosts=${2:?"--hosts needs a number"}; shift 2 ;;
    --hosts=*) hosts=${1#*=}; shift ;;
    --devices) devices=${2:?"--devices needs a number"}; shift 2 ;;
    --devices=*) devices=${1#*=}; shift ;;
    *) flags+=("$1"); shift ;;
  esac
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -z $hosts ]] || ACCELERATOR=cpu
extra=$(accelerator)
"$here/environment.sh" ${extra:+"$extra"}
train=("$here/../.venv/bin/vit-scale" train "${flags[@]}")
if [[ -n $hosts ]]; then
  exec "$here/../.venv/bin/python" "$here/pod.py" --hosts "$hosts" --devices "$devices" "${train[@]}"
fi
exec "${train[@]}"
