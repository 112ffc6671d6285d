# shellcheck shell=bash
# Options of all launchers:
#   --attempts=10  how often to try; a finished run, a wrong config (code 2) or Ctrl-C (130) ends it.
#                  One that was asked to stop and has saved (75) starts again at once and is no
#                  attempt; with --attempts=1 nothing is started again
#   --pause=10     seconds before the next time
#   --cache=DIR    of compiled programs, gs:// too; else $JAX_COMPILATION_CACHE_DIR or ~/.cache/ouro_jax
#   --logs=DIR     of a file for each process (logs/NAME)
#   --name=NAME    of the job; else the last part of --workdir
#   --dry_run      print what would run
# They are the launcher's wherever they stand; what follows a `--` is all ouro's.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH=$PATH:$root/.venv/bin
attempts=10 pause=10 cache="" logs="" name="" dry_run=false command=()
stopping=false # whether this launcher was told to stop: a trap of its own sets it

# The comments at the head of the launcher and of this file.
usage() {
  awk 'FNR == 1 { on = 1; next } !/^#/ { on = 0 } on && !/^# shellcheck/ { sub(/^# ?/, ""); print }' \
    "$0" "${BASH_SOURCE[0]}"
}

fail() {
  usage >&2
  printf '\nerror: %s\n' "$1" >&2
  exit 2
}

# parse "OPTION …" ARGUMENT …: sets the variable of each option; the rest goes to `command`.
parse() {
  local options=" attempts pause cache logs name dry_run $1 " option word
  for word in "${@:2}"; do
    shift
    option=${word%%=*} option=${option#--}
    if [[ $word == -- ]]; then
      break
    elif [[ $word == -h || $word == --help ]]; then
      usage && exit
    elif [[ $word == --* && $options == *" $option "* ]]; then
      assign "$option" "${word#"--$option"}"
    elif ((${#command[@]})) || [[ $word != --* || $word == --config* || $word == --workdir=* ]]; then
      command+=("$word")
    else
      fail "$word: no such option"
    fi
  done
  command+=("${@:2}")
  if [[ ${command[0]:-} == -* ]]; then command=(train "${command[@]}"); fi
  for word in "${command[@]}"; do
    if [[ $word == --workdir=* ]]; then name=${name:-$(basename "${word#*=}")}; fi
  done
  name=${name:-ouro} logs=${logs:-logs/${name:-ouro}}
  whole_numbers attempts pause
}

# One whose variable is true or false takes no value.
assign() {
  case ${!1}$2 in
    false) printf -v "$1" true ;;
    true* | false*) fail "--$1: give it once, without a value" ;;
    *) if [[ $2 == =?* ]]; then printf -v "$1" '%s' "${2#=}"; else fail "--$1: expected --$1=…"; fi ;;
  esac
}

whole_numbers() {
  local option
  for option in "$@"; do
    [[ ${!option} =~ ^[1-9][0-9]{0,5}$|^0$ ]] || fail "--$option=${!option}: expected a whole number"
  done
}

# needs PROGRAM OPTION …: what must be there. A dry run needs no program.
needs() {
  local option
  for option in "${@:2}"; do [[ -n ${!option} ]] || fail "--$option is missing"; done
  $dry_run || command -v "$1" >/dev/null || fail "$1: not found on the PATH"
  ((${#command[@]})) ||
    fail "nothing to run; expected e.g. train --config=configs/tiny.py --workdir=runs/tiny"
}

# Words as one would type them.
quoted() {
  local word out="" quote="'"
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./~-]+$ ]]; then word="'${word//$quote/$quote\\$quote$quote}'"; fi
    out+=" $word"
  done
  echo "${out# }"
}

# run COMMAND …: runs it, or prints it under --dry_run.
run() { if $dry_run; then quoted "$@"; else "$@"; fi; }

# restart COMMAND …: runs it until it ends for good, at most `attempts` times, and not again once this
# launcher is stopping: then 75 tells whoever started it that the same command goes on.
restart() {
  local attempt=1 code=1
  while ((attempt <= attempts)); do
    if $stopping; then return 75; fi
    "$@"
    code=$?
    # 143: the signal that it was passed on killed it, because it was too young to answer.
    if $stopping && ((code == 143)); then code=75; fi
    case $code in
      0 | 2 | 130) return "$code" ;;
      75) if ((attempts == 1)) || $stopping; then return 75; fi ;;
      *)
        echo "attempt $attempt of $attempts ended with code $code" >&2
        if $stopping; then return "$code"; fi
        if ((attempt++ < attempts)); then rest; fi
        ;;
    esac
  done
  return "$code"
}

# The pause, by the second: a trap waits for a command.
rest() {
  local second
  for ((second = 0; second < pause; second++)); do
    if $stopping; then return; fi
    sleep 1
  done
}

# ended PROCESS: waits until it has, whatever signals come meanwhile, and returns its code. A trap
# does not wait for `wait`, which it ends.
ended() {
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1"
}
