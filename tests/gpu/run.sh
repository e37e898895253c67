#!/usr/bin/env bash
# Everything that needs a card, most important first, at most 25 minutes, whatever fails on the way:
#
#   bash tests/gpu/run.sh                    results: data_recipes/measured/*_gpu.json, logs: outputs/gpu/
#   bash tests/gpu/run.sh --cpu-rehearsal    every step once on a toy model, where there is no card; nothing is recorded
#
# Nothing is downloaded. PYTHON names the interpreter (default .venv/bin/python); any torch in Unsloth's range will do.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
MINUTES=${MINUTES:-25}
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOOLKIT_OUTPUTS=${TOOLKIT_OUTPUTS:-$PWD/outputs/gpu}
REHEARSAL= MEASURED=data_recipes/measured PACE=1
bench=(--sizes 0.6B 4B 8B 14B --record) # written after every run: what time cuts off is the largest models
if [ "${1:-}" = --cpu-rehearsal ]; then
  REHEARSAL=yes MEASURED=$TOOLKIT_OUTPUTS PACE=4 bench=(--toy)
  export TRITON_INTERPRET=1 # the loss of plain TRL is a Triton kernel
fi
END=$((SECONDS + MINUTES * 60 * PACE))
mkdir -p "$TOOLKIT_OUTPUTS"
summary=$TOOLKIT_OUTPUTS/summary.txt
: >"$summary"

# step NAME SECONDS COMMAND…: run it, at most so long and never past the end; its output goes to a log of its own
step() {
  local name=$1 limit=$(($2 * PACE)) left=$((END - SECONDS)) began=$SECONDS status
  shift 2
  if [ "$left" -lt 20 ]; then
    echo "$name: skipped, no time left" | tee -a "$summary"
    return
  fi
  echo "$name …"
  timeout --signal=INT --kill-after=20 "$((limit < left ? limit : left))" "$@" >"$TOOLKIT_OUTPUTS/$name.log" 2>&1
  status=$?
  echo "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)") after $((SECONDS - began)) s" | tee -a "$summary"
}

step doctor 300 "$PYTHON" -m toolkit doctor --gpu ${REHEARSAL:+--cpu-rehearsal}
if [ -z "$REHEARSAL" ] && grep -qs '"on_cpu": true' "$TOOLKIT_OUTPUTS/doctor.json"; then
  cat "$TOOLKIT_OUTPUTS/doctor.log"
  echo "no card to measure; every step on a CPU: bash tests/gpu/run.sh --cpu-rehearsal"
  exit 1
fi
[ ! -f "$TOOLKIT_OUTPUTS/doctor.json" ] || cp "$TOOLKIT_OUTPUTS/doctor.json" "$MEASURED/doctor_gpu.json"
step tests 420 "$PYTHON" -m pytest -q tests/test_gpu.py
step whole_run 300 "$PYTHON" -m tests.gpu.whole_run "$MEASURED/whole_run_gpu.json"
step speed 600 "$PYTHON" -m tests.tools.bench --measure speed --repeats 1 "${bench[@]}"
step cards 600 "$PYTHON" -m tests.tools.bench --measure cards "${bench[@]}"
cat "$summary"
! grep -q FAILED "$summary"
