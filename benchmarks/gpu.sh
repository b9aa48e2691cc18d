#!/usr/bin/env bash
# Run all measurements that need a GPU, in one call, on a GPU machine without network access.
#
#   benchmarks/gpu.sh OUT [WHEELS]
#
# OUT gets the result files and log.txt. WHEELS (.whl) holds wheels of the packages that python3 lacks there; a large one
# may be in parts: split -b 60M -d X.whl X.whl.part
# They are installed into python3 itself, so use a machine that is discarded afterwards.
# A step that fails is logged and the others continue; the exit status is the number of failed steps.
# SIZE is the side of the synthetic slide in pixels (40960), LIMIT the seconds a step may take (240).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "$1" && cd "$1" && pwd)
WHEELS=${2:-.whl}
SIZE=${SIZE:-40960}
LIMIT=${LIMIT:-240}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
failed=0

step() {  # step NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    echo "== $name" | tee -a "$OUT/log.txt"
    if timeout "$LIMIT" "$@" >>"$OUT/log.txt" 2>&1; then
        echo "   done in $((SECONDS - start)) s" | tee -a "$OUT/log.txt"
    else
        echo "   FAILED ($?) after $((SECONDS - start)) s" | tee -a "$OUT/log.txt"
        failed=$((failed + 1))
    fi
}

install() {
    shopt -s nullglob
    local first whole wheels
    for first in "$WHEELS"/*.part00; do
        whole=$WORK/$(basename "${first%.part00}")
        cat "${first%.part00}".part?? >"$whole"
    done
    wheels=("$WHEELS"/*.whl "$WORK"/*.whl)
    if [[ " ${wheels[*]} " == *onnxruntime_gpu* ]]; then
        python3 -m pip uninstall -y onnxruntime  # the two overwrite each other's files
    fi
    if ((${#wheels[@]})); then
        python3 -m pip install --no-index --no-deps "${wheels[@]}" || return 1
    fi
    python3 -m pip install --no-index --no-deps --no-build-isolation --editable .
}

make_inputs() {
    python3 - "$WORK" "$SIZE" <<'PYTHON'
import sys
from pathlib import Path

from histostream.benchmarks.inputs import save_untrained, write_repeated
from histostream.export import Options, export_checkpoint
from histostream.training.methods.imems import method as imems

work, size = Path(sys.argv[1]), int(sys.argv[2])
options = Options(precisions=("fp32", "fp16"))
write_repeated(work / "slide.tif", size, size)
export_checkpoint("imems", None, work / "base16", options, say=print)
save_untrained(work / "run64", imems.Config(base_width=64, adversarial=False), head_gain=8)
export_checkpoint("imems", work / "run64", work / "base64", options, say=print)
PYTHON
}

export -f install make_inputs
export WHEELS WORK SIZE
step "machine" bash -c 'nvidia-smi || true; python3 --version'
step "install" bash -c install
step "doctor" bash -c "python3 -m histostream.benchmarks.cli doctor --json >'$OUT/doctor.json'"
step "gpu tests" python3 -m pytest -q -m gpu -p no:cacheprovider tests
step "inputs" bash -c make_inputs
for base in 16 64; do
    run=(); [[ $base == 64 ]] && run=(--checkpoint "$WORK/run64")
    step "compare base $base" python3 -m histostream.benchmarks.cli compare \
        --model "$WORK/base$base" "${run[@]}" --batch 8 --tiles 16 --out "$WORK/compare$base"
    cp "$WORK/compare$base/compare.json" "$OUT/compare-base$base.json" 2>/dev/null
    step "end to end base $base" python3 -m histostream.benchmarks.cli run \
        --model "$WORK/base$base" --slide "$WORK/slide.tif" --repeats 1 --out "$WORK/bench$base"
    cp "$WORK/bench$base/bench.json" "$OUT/bench-base$base.json" 2>/dev/null
done
step "training" python3 -m histostream.benchmarks.training --compile --out "$OUT/training-gpu.json"
echo "$failed steps failed" | tee -a "$OUT/log.txt"
exit "$failed"
