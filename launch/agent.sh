#!/usr/bin/env bash
# The worker's side of a run: launch/tpu copies this script to every host and calls its verbs there.
#
#   agent.sh prepare SHA EXTRA [SETUP]   unpack the code, create the environment, run SETUP, print a fingerprint
#   agent.sh secrets RUN                 read NAME=VALUE lines from standard input, ended by #END
#   agent.sh start RUN ATTEMPT SHA PORT ARGUMENT...    run vit-scale ARGUMENT..., detached
#   agent.sh show SHA ARGUMENT...        run vit-scale ARGUMENT... on the CPU, to resolve a config
#   agent.sh status RUN ATTEMPT|last [OFFSET [WATCHER]]    print the attempt's state, and its log from OFFSET
#   agent.sh lease RUN WATCHER           record that WATCHER watches this run
#   agent.sh stop RUN ATTEMPT GRACE      send SIGTERM to the trainer, and SIGKILL to its group after GRACE seconds
#   agent.sh stacks RUN ATTEMPT          send SIGUSR1 to the trainer, which prints its threads' stacks
#   agent.sh profile RUN ATTEMPT         have the trainer trace its next steps (SIGUSR2); print the trace's folder
#   agent.sh reap RUN PATIENCE COMMAND...  run COMMAND once nothing runs and no launcher has called for PATIENCE s, until it succeeds
#   agent.sh disarm RUN                  cancel reap: keep the machine
#   agent.sh gc [COPIES]                 remove old code and logs
#
# Guarantees: every verb is idempotent, so a call may be repeated after a dropped connection; an attempt starts at most
# once, and not after a later one or its own stop; a secret is on disk only until the trainer has read it; the exit code
# is never 255, which ssh uses for its own errors.
#
# Exit codes: 0; 64 usage; 65 upload damaged; 70 environment; 71 disk full; 75 too late, or busy (retry); 79 TPU held by
# another program.
#
# Environment: VIT_SCALE_HOME (folder for all of this), VIT_SCALE_VENV (an existing environment, used as it is),
# VIT_SCALE_DEVICES (folder of the device files).
set -uo pipefail
umask 077
export LC_ALL=C  # decimal points; not passed on to the trainer

home=${VIT_SCALE_HOME:-$HOME/.vit_scale}
venv=${VIT_SCALE_VENV:-$home/venv}
devices=${VIT_SCALE_DEVICES:-/dev}
temporary=${TMPDIR:-/tmp}
self=$home/agent.sh
need=10  # GB that must be free before creating an environment

say() { echo "agent: $*" >&2; }
fail() { local code=$1; shift; say "$@"; exit "$code"; }

# Writes a file atomically.
put() { cat >"$1.$$" && mv -f "$1.$$" "$1"; }

lock() {  # FILE SECONDS
  mkdir -p "${1%/*}"
  exec 9>"$1"
  flock -w "$2" 9 || fail 75 "busy: ${1##*/} was locked for $2 s"
}

# --- processes --------------------------------------------------------------------------------------------------

started() {  # PID: its start time in clock ticks since boot, which with the PID identifies a process
  local stat fields
  { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  read -ra fields <<<"${stat##*) }"
  [[ ${fields[0]} != Z ]] && echo "${fields[19]}"
}

members() {  # GROUP: print the PIDs of its processes
  local stat fields
  for stat in /proc/[0-9]*/stat; do
    { read -r stat <"$stat"; } 2>/dev/null || continue
    read -ra fields <<<"${stat##*) }"
    if [[ ${fields[2]} == "$1" && ${fields[0]} != Z ]]; then echo "${stat%% *}"; fi
  done
}

alive() {  # ATTEMPT_FOLDER: succeed if any process of the attempt is running
  local group ticks now
  { read -r group ticks <"$1/group"; } 2>/dev/null || return 1
  if now=$(started "$group"); then [[ $now == "$ticks" ]]; return; fi
  [[ -n $(members "$group") ]]
}

record() {  # ATTEMPT_FOLDER CODE: record the exit code; the first one counts
  [[ -e $1/rc ]] || echo "$2 $(date +%s.%N)" | put "$1/rc"
}

kill_all() {  # ATTEMPT_FOLDER
  local group uploader pid tries
  read -r group _ 2>/dev/null <"$1/group" || return 0
  if alive "$1" && read -r uploader 2>/dev/null <"$1/uploader"; then
    # The leader ends itself once the log, with its last lines, is in the bucket.
    for pid in $(members "$group"); do ((pid == group || pid == uploader)) || kill -KILL "$pid" 2>/dev/null; done
    record "$1" 137
    for ((tries = 0; tries < 300; tries++)); do alive "$1" || break; sleep 0.1; done
  fi
  for ((tries = 0; tries < 100; tries++)); do
    alive "$1" || break
    kill -KILL -- "-$group" 2>/dev/null
    sleep 0.05
  done
  record "$1" 137
}

holders() {  # print the PIDs that have a TPU device file open
  local sudo=()
  if sudo -n true 2>/dev/null; then sudo=(sudo -n); fi
  "${sudo[@]}" find /proc/[0-9]*/fd -maxdepth 1 \( -lname "$devices/accel*" -o -lname "$devices/vfio/[0-9]*" \) \
    -printf '%h\n' 2>/dev/null | cut -d/ -f3 | sort -un
}

newest() {  # RUN_FOLDER: print the number of its latest attempt, or 0
  local folder last=0
  for folder in "$1"/a*/; do
    folder=${folder%/}; folder=${folder##*/a}
    if [[ $folder =~ ^[0-9]+$ ]] && ((folder > last)); then last=$folder; fi
  done
  echo "$last"
}

# --- code and environment ---------------------------------------------------------------------------------------

free_gb() { df -Pk "$home" | awk 'NR == 2 { print int($4 / 1048576) }'; }

room() {
  (($(free_gb) >= need)) && return
  say "less than $need GB free: removing old code, logs and package caches"
  gc 1
  rm -rf "$HOME/.cache/uv" "$HOME/.cache/pip" "$temporary/tpu_logs"
  (($(free_gb) >= need)) || fail 71 "the disk is full: $(free_gb) GB free in $home, $need needed"
}

unpack() {  # SHA
  local code=$home/code/$1 sum
  if [[ -d $code ]]; then touch "$code"; return; fi
  sum=$(sha256sum 2>/dev/null <"$home/incoming/$1.tgz") || fail 65 "the code did not arrive"
  [[ ${sum:0:16} == "$1" ]] || fail 65 "the code arrived damaged: SHA-256 ${sum:0:16}, expected $1"
  rm -rf "$code.new"
  mkdir -p "$code.new"
  tar -xzf "$home/incoming/$1.tgz" -C "$code.new" || fail 71 "cannot unpack the code (see above)"
  ln -sfn "$home/data" "$code.new/.data"
  mv -T "$code.new" "$code"
  rm -f "$home/incoming/"*.tgz
}

# TPU VMs come with Python 3.10; uv installs a newer one.
find_uv() {
  PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null && return
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' && python3 -c "import ensurepip" 2>/dev/null && return
  say "installing uv"
  python3 -m pip install --quiet --user uv >&2 ||
    python3 -m pip install --quiet --user --break-system-packages uv >&2 || fail 70 "cannot install uv"
}

environment() {  # SHA EXTRA
  local try
  [[ -z ${VIT_SCALE_VENV:-} ]] || return 0
  find_uv
  for try in 1 2 3; do
    # shellcheck disable=SC2086  # an empty extra must not become an argument
    VENV=$venv "$home/code/$1/launch/environment.sh" $2 && return
    say "installation failed (try $try of 3)"
    sleep $((RANDOM % 15))
  done
  fail 70 "cannot create the environment (see above)"
}

fingerprint() {  # SHA: print what must be equal on every host
  "$venv/bin/python" - "$1" "$home/code/$1/constraints.txt" "$devices" <<'END' || fail 70 "no Python in $venv"
import glob, hashlib, importlib.metadata as metadata, json, platform, sys
code, constraints, devices = sys.argv[1:]
versions = {"python": platform.python_version(), "code": code[:12]}
versions["constraints"] = hashlib.sha256(open(constraints, "rb").read()).hexdigest()[:12]
for name in "jax jaxlib libtpu flax optax orbax-checkpoint grain numpy".split():
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        versions[name] = "-"
versions["chips"] = len(glob.glob(devices + "/accel[0-9]*") + glob.glob(devices + "/vfio/[0-9]*"))
print("#FINGERPRINT " + json.dumps(versions))
END
}

prepare() {  # SHA EXTRA [SETUP]
  lock "$home/prepare.lock" 1800
  room
  unpack "$1"
  environment "$1" "$2"
  if [[ -n ${3:-} ]]; then
    (cd "$home/code/$1" && PATH=$venv/bin:$PATH PYTHONPATH=$home/code/$1 bash -c "$3" >&2 9>&-) ||
      fail 70 "the setup command failed (see above): $3"
  fi
  fingerprint "$1"
  gc 2
}

show() {  # SHA ARGUMENT...
  local code=$home/code/$1
  shift
  cd "$code" || fail 70 "code $code does not exist"
  JAX_PLATFORMS=cpu PYTHONPATH=$code "$venv/bin/vit-scale" "$@"
}

gc() {  # COPIES: keep so many copies of the code, and the logs of five attempts of each run
  local folder
  find "$home/code" -mindepth 1 -maxdepth 1 -printf '%T@ %p\n' 2>/dev/null | sort -rn | tail -n "+$((${1:-2} + 1))" |
    while read -r _ folder; do rm -rf "$folder"; done
  for folder in "$home"/runs/*/; do
    find "$folder" -mindepth 1 -maxdepth 1 -name 'a[0-9]*' 2>/dev/null | sort -rV | tail -n +6 |
      while read -r folder; do alive "$folder" || rm -rf "$folder"; done
  done
  return 0
}

# --- a run ------------------------------------------------------------------------------------------------------

secrets() {  # RUN
  local run=$home/runs/$1
  mkdir -p "$run"
  cat >"$run/secrets.$$"
  if [[ $(tail -n 1 "$run/secrets.$$") != "#END" ]]; then  # a retry by gcloud sends nothing
    rm -f "$run/secrets.$$"
    fail 65 "the secrets arrived incomplete"
  fi
  mv -f "$run/secrets.$$" "$run/secrets"
}

free_the_tpu() {
  local tries pid
  for ((tries = 0; tries < 60; tries++)); do
    pid=$(holders | head -n 1)
    if [[ -z $pid ]]; then rm -f "$temporary"/libtpu_lockfile* 2>/dev/null; return; fi
    # Our own processes are dead by now, but their devices take a moment to be released.
    ((tries < ${VIT_SCALE_RELEASE:-20})) || break
    sleep 1
  done
  fail 79 "process $pid of $(stat -c %U "/proc/$pid" 2>/dev/null) holds the TPU: $(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c1-80)"
}

start() {  # RUN ATTEMPT SHA PORT ARGUMENT...
  local run=$home/runs/$1 attempt=$home/runs/$1/a$2 number tries
  lock "$run/lock" 60
  if [[ -e $attempt/stopped ]]; then fail 75 "attempt $2 was stopped"; fi
  if (($(newest "$run") > $2)); then fail 75 "attempt $(newest "$run") has started: attempt $2 is over"; fi
  if [[ -e $attempt/group ]]; then echo "attempt $2 has already started"; return; fi
  for ((number = 1; number < $2; number++)); do
    if [[ -e $run/a$number/group ]]; then kill_all "$run/a$number"; fi
  done
  free_the_tpu
  mkdir -p "$attempt"
  # The child inherits the lock until it has written its PID, even if this process is killed.
  setsid bash "$self" wrap "$@" </dev/null >"$attempt/train.log" 2>&1 &
  for ((tries = 0; tries < 200; tries++)); do
    if [[ -e $attempt/group ]]; then echo "attempt $2 started"; return; fi
    sleep 0.05
  done
  fail 70 "attempt $2 did not start"
}

wrap() {  # RUN ATTEMPT SHA PORT ARGUMENT...: run the attempt as the leader of its process group
  local run=$home/runs/$1 attempt=$home/runs/$1/a$2 code=$home/code/$3 line trainer uploader tries
  echo "$$ $(started $$)" | put "$attempt/group"
  exec 9>&-
  export RUN_ID=$1 ATTEMPT=$2 RUN_DIR=$run JAX_COORDINATOR_PORT=$4 VIT_SCALE_HEARTBEAT=$attempt/heartbeat.json
  export TPU_LOG_DIR=${TPU_LOG_DIR:-disabled} PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONPATH=$code
  unset LD_PRELOAD LC_ALL
  shift 4
  printf 'vit-scale %s' "$*" | sed 's/[\\"]/\\&/g' | put "$attempt/command"  # a string in JSON
  if [[ -e $run/secrets ]]; then
    while IFS= read -r line; do
      if [[ $line == *=* ]]; then export "${line%%=*}=${line#*=}"; fi
    done <"$run/secrets"
    rm -f "$run/secrets"
    export -n VIT_SCALE_REDACT  # a form of the secrets, for the upload of the log alone
  fi
  if cd "$code"; then
    umask 022
    "$venv/bin/vit-scale" "$@" &
    trainer=$!  # its file is empty if the disk is full
    echo "$trainer" | put "$attempt/pid"
    exec 2>/dev/null  # keeps bash's job messages out of the trainer's log
    if [[ " $* " == *" --workdir gs://"* ]]; then
      VIT_SCALE_REDACT=${VIT_SCALE_REDACT:-} \
        "$venv/bin/python" -m vit_scale.storage.log_upload "$attempt/train.log" "$@" >/dev/null &
      uploader=$!
      echo "$uploader" | put "$attempt/uploader"
    fi
    wait "$trainer"
    record "$attempt" $?
    # Until the log is in the bucket, half a minute at most, the attempt is still running.
    for ((tries = 0; tries < 60; tries++)); do kill -0 "${uploader:--}" || break; sleep 0.5; done
  else
    record "$attempt" 70
  fi
  kill -KILL -- -$$  # surviving children, and this process
}

send_signal() {  # ATTEMPT_FOLDER SIGNAL
  local pid tries
  for ((tries = 0; tries < 100; tries++)); do { read -r pid <"$1/pid" || ! alive "$1"; } 2>/dev/null && break; sleep 0.05; done
  kill "-$2" "$pid" 2>/dev/null
}

stop() {  # RUN ATTEMPT GRACE
  local run=$home/runs/$1 attempt=$home/runs/$1/a$2
  lock "$run/lock" 60
  rm -f "$run/secrets"
  mkdir -p "$attempt"
  if ! alive "$attempt"; then touch "$attempt/stopped"; echo "nothing runs"; return; fi
  if (($3 == 0)); then touch "$attempt/stopped"; kill_all "$attempt"; echo "killed"; return; fi
  if [[ ! -e $attempt/stopped ]]; then  # a second SIGTERM would end the trainer without saving
    touch "$attempt/stopped"
    send_signal "$attempt" TERM
    setsid bash "$self" kill_later "$attempt" "$3" </dev/null >/dev/null 2>&1 9>&- &
  fi
  echo "asked to stop"
}

kill_later() { sleep "$2"; kill_all "$1"; }

stacks() { if alive "$home/runs/$1/a$2"; then send_signal "$home/runs/$1/a$2" USR1 || true; fi; }

profile() {  # RUN ATTEMPT
  local attempt=$home/runs/$1/a$2 log=$home/runs/$1/a$2/train.log size line tries
  # Before its first heartbeat a trainer may not handle the signal yet, and would end.
  [[ -e $attempt/heartbeat.json ]] || fail 75 "training has not begun"
  size=$(stat -c %s "$log")
  send_signal "$attempt" USR2
  for ((tries = 0; tries < 600; tries++)); do
    line=$(tail -c "+$((size + 1))" "$log" | grep -m 1 -E '^vit-scale: (no )?profile of .*; (to open it|training continues)')
    [[ $line != "vit-scale: no "* ]] || fail 75 "${line#vit-scale: }"
    line=${line#vit-scale: profile of *: }
    if [[ -n $line ]]; then echo "${line%; to open it*}"; return; fi
    alive "$attempt" || fail 75 "training has ended"
    sleep 1
  done
  fail 75 "the trainer has written no profile in 600 s"
}

lease() {  # RUN WATCHER
  mkdir -p "$home/runs/$1"
  echo "$2 $(date +%s)" | put "$home/runs/$1/sitter"  # the watcher; earlier agents read this name
}

status() {  # RUN ATTEMPT|last [OFFSET [WATCHER]]
  local run=$home/runs/$1 number=$2 offset=${3:-0} attempt state=absent code="" ended="" size=0 watcher="" watched="" stopped=false
  if [[ $number == last ]]; then number=$(newest "$run"); fi
  attempt=$run/a$number
  if [[ -n ${4:-} ]]; then lease "$1" "$4"; fi
  if [[ -e $attempt/group ]]; then
    state=running  # until nothing of it runs, though its exit code may be known
    if ! alive "$attempt"; then
      state=lost
      if read -r code ended 2>/dev/null <"$attempt/rc"; then state=ended; fi
    fi
    size=$(stat -c %s "$attempt/train.log" 2>/dev/null || echo 0)
  fi
  if [[ -e $attempt/stopped ]]; then stopped=true; fi
  read -r watcher watched 2>/dev/null <"$run/sitter"
  cat <<END
#STATUS {"attempt": $number, "state": "$state", "code": ${code:-null}, "ended": ${ended:-null}, "now": $(date +%s.%N),
"free_gb": $(free_gb), "stopped": $stopped, "watcher": "$watcher", "watched_at": ${watched:-0},
"command": "$(cat "$attempt/command" 2>/dev/null)", "heartbeat": $(cat "$attempt/heartbeat.json" 2>/dev/null || echo null),
"log_offset": $offset, "log_size": $size}
#LOG
END
  if ((size > offset)); then tail -c "+$((offset + 1))" "$attempt/train.log" | head -c 262144; fi
  return 0  # whatever tail's status once head closes the pipe
}

reap() {  # RUN PATIENCE COMMAND...: start the reaper, and return at once
  local run=$home/runs/$1
  lock "$run/lock" 60
  if alive "$run/reaper"; then echo "already armed"; return; fi
  mkdir -p "$run/reaper"
  rm -f "$run/reaper/group"
  setsid bash "$self" reaper "$@" </dev/null >"$run/reaper/log" 2>&1 9>&- &
  echo "armed"
}

disarm() {  # RUN
  local run=$home/runs/$1
  lock "$run/lock" 60
  if alive "$run/reaper"; then kill_all "$run/reaper"; fi
  echo "disarmed"
}

preparing() {  # succeed while an environment is being created, for at most two hours: a setup command may hang
  (($(date +%s) < $(stat -c %Y "$home/prepare.lock" 2>/dev/null || echo 0) + 7200)) || return 1
  ! flock -n "$home/prepare.lock" true
}

# The last resort against a forgotten machine, whose launcher is gone and on which nothing trains.
reaper() {
  local run=$home/runs/$1 patience=$2 began asked ended number
  echo "$$ $(started $$)" | put "$run/reaper/group"
  shift 2
  began=$(date +%s)
  while sleep "$((patience / 10 + 1))"; do
    number=$(newest "$run")
    alive "$run/a$number" && continue
    preparing && continue
    read -r _ asked 2>/dev/null <"$run/sitter" || asked=0
    ended=$(stat -c %Y "$run/a$number" 2>/dev/null || echo 0)
    asked=$((asked > ended ? asked : ended))
    if (($(date +%s) > (asked > began ? asked : began) + patience)); then
      echo "idle, and no launcher has called for $patience s: $*"
      "$@" && return  # retry later: the API may not have answered
    fi
  done
}

# --- the command line -------------------------------------------------------------------------------------------

# The verbs, and how many arguments each has at least.
declare -A least=([prepare]=2 [show]=2 [gc]=0 [secrets]=1 [start]=5 [wrap]=5 [status]=2 [stop]=3 [kill_later]=2
  [stacks]=2 [profile]=2 [lease]=2 [reap]=3 [reaper]=3 [disarm]=1)
trap 'code=$?; if ((code == 255)); then exit 254; fi' EXIT
verb=${1:-}
shift || true
[[ -n ${least[${verb:-none}]:-} ]] || fail 64 "unknown verb '$verb'"
(($# >= least[$verb])) || fail 64 "usage: $(grep -m 1 "agent.sh $verb " "$0" | cut -c5-)"
"$verb" "$@"
