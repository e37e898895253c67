#!/usr/bin/env bash
# What a card is to show, most valuable first, in 500 seconds, whatever fails on the way:
#
#   bash tests/gpu/run.sh                    results: outputs/gpu/, or the folder $OUT; at most seven files, each written at once
#   bash tests/gpu/run.sh --cpu-rehearsal    every step once on a toy model, where there is no card
#
# LIMIT=1500 gives it more seconds: what comes last is then reached. Nothing is downloaded. PYTHON names the interpreter (default
# .venv/bin/python); any torch in Unsloth's range will do.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-$PWD/outputs/gpu}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export HF_HUB_OFFLINE=1 WANDB_MODE=offline PYTHONUNBUFFERED=1 UNSLOTH_DISABLE_STATISTICS=1 TOOLKIT_OUTPUTS=$WORK/outputs
SIZE=4B LENGTH=2048 STEPS=14 WARM_UP=4 TOKENS=160 REHEARSAL= PACE=1
if [ "${1:-}" = --cpu-rehearsal ]; then
  SIZE=tests/support/files/bench_shape.json LENGTH=64 STEPS=3 WARM_UP=1 TOKENS=4 REHEARSAL=yes PACE=6
  export TRITON_INTERPRET=1 # the loss of plain TRL is a Triton kernel
fi
END=$((SECONDS + ${LIMIT:-500} * PACE))
mkdir -p "$OUT"
: >"$OUT/summary.txt"
: >"$OUT/log.txt"

# step NAME SECONDS COMMAND…: run it, at most so long and never past the end; all that it prints goes to log.txt
step() {
  local name=$1 limit=$(($2 * PACE)) left=$((END - SECONDS)) began=$SECONDS status
  shift 2
  if [ "$left" -lt 15 ]; then
    echo "$name: skipped, no time left" | tee -a "$OUT/summary.txt"
    return 1
  fi
  echo "== $name" >>"$OUT/log.txt"
  timeout --signal=INT --kill-after=10 "$((limit < left ? limit : left))" "$@" >>"$OUT/log.txt" 2>&1
  status=$?
  echo "$name: $([ $status = 0 ] && echo passed || echo "FAILED ($status)") after $((SECONDS - began)) s" | tee -a "$OUT/summary.txt"
  return $status
}

# way NAME JOB: one way to train, as tests/tools/bench/ways.py knows it; its result is a line of speed.jsonl
way() {
  step "$1" 90 bash -c "set -o pipefail; $PYTHON -m tests.tools.bench.ways '$2' | tee >(tail -1 >>'$OUT/speed.jsonl') && ! tail -1 '$OUT/speed.jsonl' | grep -q '\"failed\"'"
}

job() { # job WAY SIZE STEPS
  echo "{\"way\": \"$1\", \"work\": \"$WORK/$(basename "$2")\", \"size\": \"$2\", \"max_length\": $LENGTH, \"steps\": $3, \"warm_up\": $WARM_UP}"
}

CHECK='import torch, unsloth, trl, peft, bitsandbytes
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
device = "cuda" if torch.cuda.is_available() else "cpu"
x = torch.randn(64, 64, device=device, dtype=torch.bfloat16)
packed, state = quantize_4bit(x, quant_type="nf4")
print(torch.__version__, torch.version.cuda, device, (dequantize_4bit(packed, state) - x).abs().mean().item())'

rm -f "$OUT"/speed.jsonl "$OUT"/doctor.json "$OUT"/decode.json "$OUT"/whole_run.json "$OUT"/cards.json
step import 60 "$PYTHON" -c "$CHECK" || { cat "$OUT/summary.txt"; tail -5 "$OUT/log.txt"; exit 1; }
step doctor 190 "$PYTHON" -m toolkit doctor --gpu ${REHEARSAL:+--cpu-rehearsal}
[ ! -f "$TOOLKIT_OUTPUTS/doctor.json" ] || cp "$TOOLKIT_OUTPUTS/doctor.json" "$OUT/"
if [ -z "$REHEARSAL" ] && grep -qs '"on_cpu": true' "$OUT/doctor.json"; then
  cat "$OUT/log.txt"
  echo "no card to measure; every step on a CPU: bash tests/gpu/run.sh --cpu-rehearsal"
  exit 1
fi
mkdir -p "$WORK/$(basename "$SIZE")"
step weights 60 "$PYTHON" -m tests.tools.bench.ways "$(job weights "$SIZE" 1)"
way ours "$(job ours "$SIZE" $STEPS)"
way notebook "$(job notebook "$SIZE" $STEPS)"
step decode 110 "$PYTHON" -m tests.gpu.decode "$WORK/$(basename "$SIZE")/model" "$OUT/decode.json" $TOKENS
PYTORCH_ALLOC_CONF=expandable_segments:False way ours_without_expandable_segments "$(job ours "$SIZE" $STEPS)"
step whole_run 300 "$PYTHON" -m tests.gpu.whole_run "$OUT/whole_run.json"
step cards 400 "$PYTHON" -m tests.tools.bench --measure cards $([ -z "$REHEARSAL" ] && echo --sizes 0.6B 4B || echo --toy)
[ ! -f "$TOOLKIT_OUTPUTS/cards_gpu.json" ] || cp "$TOOLKIT_OUTPUTS/cards_gpu.json" "$OUT/cards.json"
step tests 420 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
! grep -q FAILED "$OUT/summary.txt"
