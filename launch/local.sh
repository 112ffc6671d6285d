#!/usr/bin/env bash
# Runs `ouro VERB …` (`train` if none is named) on this host, and again after a crash. TERM is passed
# on: the run saves, and this ends with its code, 75.
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
processes=1 groups=()
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
    # A process that is saving must not lose its log.
    "${words[@]}" 2>&1 | (trap '' TERM && exec tee -ia "$logs/$(hostname)_$1.log")
  fi
}

# Each process has a group, which its signals reach whole. The first to fail is the cause.
together() {
  local number port=$((20000 + RANDOM % 20000)) code
  set -m
  groups=()
  for ((number = 0; number < processes; number++)); do
    # What leads the group lives until ouro has ended: its code is ouro's.
    { trap : TERM && process "$number" "$port"; } &
    groups+=("$!")
  done
  if $stopping; then tell TERM; fi
  first
  code=$?
  if ((code == 75)); then
    for number in "${groups[@]}"; do ended "$number"; done
  elif ((code && processes > 1)); then
    # The others notice, and say so in their logs, within a second or two.
    sleep "$((pause < 5 ? pause : 5))" && end KILL
  fi
  return "$code"
}

# The code of the first that fails, or 0. A signal ends a `wait`, but bash keeps the codes.
first() {
  local left=("${groups[@]}") number
  while ((${#left[@]})); do
    wait -n
    for number in "${!left[@]}"; do
      kill -0 "${left[number]}" 2>/dev/null && continue
      wait "${left[number]}" || return
      unset "left[number]"
    done
  done
}

tell() { kill -s "$1" -- "${groups[@]/#/-}" 2>/dev/null; }
end() {
  tell "$1"
  wait
}

if $dry_run; then
  echo "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR"
  for ((number = 0; number < processes; number++)); do process "$number" PORT; done
  exit
fi
if [[ -n $logs ]]; then mkdir -p "$logs"; fi
# HUP: the terminal has gone, which only this shell is told.
trap 'end INT; exit 130' INT HUP
trap 'stopping=true; tell TERM' TERM
restart together
