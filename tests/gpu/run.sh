#!/usr/bin/env bash
# Everything that needs a card, most important first, at most 25 minutes, whatever fails on the way:
#
#   bash tests/gpu/run.sh            results: data_recipes/measured/*_gpu.json, logs: outputs/gpu/
#
# Nothing is downloaded. PYTHON names the interpreter (default .venv/bin/python); any torch in Unsloth's range will do.
# REHEARSE=1 walks through it on a CPU: the doctor's rehearsal, GPU tests skipped, tiny shapes; nothing is recorded.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
MINUTES=${MINUTES:-25}
REHEARSE=${REHEARSE:-}
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOOLKIT_OUTPUTS=${TOOLKIT_OUTPUTS:-$PWD/outputs/gpu}
MEASURED=data_recipes/measured
[ -z "$REHEARSE" ] || MEASURED=$TOOLKIT_OUTPUTS
END=$((SECONDS + MINUTES * 60))
mkdir -p "$TOOLKIT_OUTPUTS"
summary=$TOOLKIT_OUTPUTS/summary.txt
: >"$summary"

# step NAME SECONDS COMMAND…: run it, at most so long and never past the end; its output goes to a log of its own
step() {
  local name=$1 limit=$2 left=$((END - SECONDS)) began=$SECONDS status
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

step doctor 300 "$PYTHON" -m toolkit doctor --gpu ${REHEARSE:+--cpu-rehearsal}
[ ! -f "$TOOLKIT_OUTPUTS/doctor.json" ] || cp "$TOOLKIT_OUTPUTS/doctor.json" "$MEASURED/doctor_gpu.json" 2>/dev/null
step tests 420 "$PYTHON" -m pytest -q tests/test_gpu.py
step whole_run 300 "$PYTHON" -m tests.gpu.whole_run "$MEASURED/whole_run_gpu.json"
if [ -z "$REHEARSE" ]; then # both write their file anew after every run: what time cuts off is the largest models
  step speed 600 "$PYTHON" -m tests.bench --measure speed --sizes 0.6B 4B 8B 14B --repeats 1 --record
  step cards 600 "$PYTHON" -m tests.bench --measure cards --sizes 0.6B 4B 8B 14B --record
fi
cat "$summary"
! grep -q FAILED "$summary"
