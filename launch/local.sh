#!/usr/bin/env bash
# Trains on this machine, from a fresh clone: on the CPU, its GPUs, or the TPU of this VM.
set -euo pipefail

usage() {
  cat <<'END'
launch/local.sh --config NAME [FLAG...]

Create or update .venv, then run `vit-scale train` with these flags. Rerun the same command to
resume. The exit code is the trainer's: 0 done, 1 failed, 2 usage, 42 stopped but resumable, 43 diverged.

  --config quickstart             a config of configs/, a path, or NAME:ARGUMENT
  --workdir runs/quickstart       the run folder
  --config.optim.lr=3e-4          override any field of configs/base.py
  --hosts 4 --devices 2           simulate a pod: 4 processes with 2 virtual CPU devices each

  ACCELERATOR=cpu|gpu|tpu         install JAX for this accelerator (default: detected)
  PYTHON=/path/to/python          the interpreter of .venv (default: Python 3.12, else python3)
END
}

# Prints the extra of pyproject.toml for this machine's accelerator, or nothing.
accelerator() {
  if [[ -n ${ACCELERATOR:-} ]]; then
    case $ACCELERATOR in
      cpu) ;;
      gpu | tpu) echo "$ACCELERATOR" ;;
      *) echo "local: ACCELERATOR=$ACCELERATOR is not cpu, gpu or tpu" >&2; return 2 ;;
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

pod=() flags=()
while (($#)); do
  case $1 in
    --hosts | --devices) pod+=("$1=${2:?"$1 needs a number"}"); shift 2 ;;
    --hosts=* | --devices=*) pod+=("$1"); shift ;;
    *) flags+=("$1"); shift ;;
  esac
done

[[ ${pod[*]-} != --devices=* || ${pod[*]} == *--hosts=* ]] || { echo "local: --devices needs --hosts N" >&2; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
((${#pod[@]} == 0)) || ACCELERATOR=cpu
extra=$(accelerator)
"$here/environment.sh" ${extra:+"$extra"}
train=("$here/../.venv/bin/vit-scale" train "${flags[@]}")
if ((${#pod[@]})); then
  exec "$here/../.venv/bin/python" "$here/pod.py" "${pod[@]}" "${train[@]}"
fi
exec "${train[@]}"
