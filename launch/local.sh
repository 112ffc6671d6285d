#!/usr/bin/env bash
# Runs `ouro VERB …` (`train` if none is named) on this host, and again after a crash.
#
#   launch/local.sh [option …] [VERB] --flag=value …
#   launch/local.sh --config=configs/tiny.py --workdir=runs/tiny
#   launch/local.sh --processes=2 train --config=configs/tiny.py --workdir=runs/tiny
#
#   --processes=1  so many, joined over loopback: many hosts, tried on one. When one fails, the
#                  others are ended and all start again.
#   --logs=DIR     DIR/HOST_PROCESS.log; a single process writes none unless told
#
# shellcheck source=common.sh
. "$(dirname "$0")/common.sh"
processes=1
parse processes "$@"
whole_numbers processes
needs ouro
if ((processes == 1)) && [[ $* != *--logs=* ]]; then logs=""; fi
export JAX_COMPILATION_CACHE_DIR=${cache:-${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/ouro_jax}}

# process NUMBER PORT: one of them, in an attempt that meets at PORT.
process() {
  local words=(ouro "${command[@]}")
  if ((processes > 1)); then
    words+=("--coordinator=localhost:$2" "--num_processes=$processes" "--process_id=$1")
  fi
  if [[ -z $logs ]] || $dry_run; then
    run "${words[@]}"
  else
    "${words[@]}" 2>&1 | tee -ia "$logs/$(hostname)_$1.log"
  fi
}

# Each process leads a group, which its signals reach whole. The first to fail is the cause.
together() {
  local number port=$((20000 + RANDOM % 20000)) code=0
  set -m
  groups=()
  for ((number = 0; number < processes; number++)); do
    process "$number" "$port" &
    groups+=("-$!")
  done
  for ((number = 0; number < processes && code == 0; number++)); do wait -n || code=$?; done
  # The others notice, and say so in their logs, within a second or two.
  if ((code)); then sleep "$((pause < 5 ? pause : 5))" && end KILL; fi
  return "$code"
}

end() {
  kill -s "$1" -- "${groups[@]}" 2>/dev/null
  wait
}

if $dry_run; then
  echo "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR"
  for ((number = 0; number < processes; number++)); do process "$number" PORT; done
  exit
fi
if [[ -n $logs ]]; then mkdir -p "$logs"; fi
if ((processes == 1)); then
  restart process 0
else
  trap 'end INT; exit 130' INT TERM
  restart together
fi
