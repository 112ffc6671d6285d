#!/usr/bin/env bash
# Trains on this machine and starts again after a crash; a finished run or a wrong config ends it.
#   launch/local.sh --config=configs/tiny.py --workdir=runs/tiny
set -uo pipefail
attempts=${ATTEMPTS:-10}
for attempt in $(seq "$attempts"); do
  ouro train "$@"
  code=$?
  # 0: finished. 2: a wrong flag or config, which no restart mends. 130: interrupted by hand.
  case $code in 0 | 2 | 130) exit $code ;; esac
  echo "attempt $attempt of $attempts ended with code $code; continuing from the last checkpoint" >&2
done
exit "$code"
