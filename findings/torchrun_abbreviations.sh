#!/usr/bin/env bash
# torchrun reads the arguments of the program that it starts as if they might be its own.
#
# Guess: what stands after the program's name is the program's, as the usage line says (training_script ...).
# Seen: a flag of the program that two of torchrun's begin with (--num: --numa-binding, --numa_binding; --start:
# --start-method, --start_method) ends torchrun with "ambiguous option" before anything starts, though it stands behind
# the program. Any other flag passes. `accelerate launch` passes the same. With `--` before the program all pass.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install -q --disable-pip-version-check "torch==2.14.1" "accelerate==1.15.0" numpy
cd "$place"
printf 'import sys\nprint("got", *sys.argv[1:])\n' > show.py
run() { "$place/env/bin/torchrun" --nproc_per_node 1 "$@" 2>&1 | tail -n 1 || true; }
for flag in --num --start; do
  before=$(run show.py "$flag" 3)
  after=$(run -- show.py "$flag" 3)
  echo "$flag: $before | with --: $after"
  case "$before" in *"ambiguous option: $flag"*) ;; *) echo "it passes now"; exit 1 ;; esac
  test "$after" = "got $flag 3"
done
test "$(run show.py --out 3)" = "got --out 3"
test "$("$place/env/bin/accelerate" launch --cpu show.py --num 3 2>/dev/null | tail -n 1)" = "got --num 3"
