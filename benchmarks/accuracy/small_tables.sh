#!/usr/bin/env bash
# Fill the small tables of docs/results.md on one core, in order of value: benchmarks/accuracy/small_tables.sh RUNS [OUT]
#
# A cell that is in its result file in OUT is not made again; one that was stopped continues from its last checkpoint; one that
# fails is listed in RUNS/failed.txt and the others go on. In all it takes about a day; seconds of a cell are in its record.
set -uo pipefail
cd "$(dirname "$0")/../.."
RUNS=$1
OUT=${2:-benchmarks/results}
export OMP_NUM_THREADS=1
mkdir -p "$RUNS" "$OUT"
exec 9>"$RUNS/.tables.lock"
flock -n 9 || { echo "small_tables.sh: another one fills $RUNS" >&2; exit 1; }

cells() { # MODULE --pair|--table NAME SIZE NUMBER ROW...
  local module=$1 kind=$2 name=$3 size=$4 number=$5 row
  shift 5
  for row in "$@"; do
    nice -n 15 .venv/bin/python -m "histostream.benchmarks.accuracy.$module" --data "${HISTO_DATA:-../shared/data}" \
      "$kind" "$name" --size "$size" --only "$row" --number "$number" --runs "$RUNS" --out "$OUT" \
      --device cpu --precision bf16 --threads 1 >>"$RUNS/log.txt" 2>&1 ||
      echo "$name $size $row $number" >>"$RUNS/failed.txt"
  done
}

for fold in 0 1 2; do
  cells adaptation --pair tnbc-other short "$fold" \
    "source only" "self-ensembling" "CellSegUDA" "DA-ADV" "without entropy" "source + target forward"
done
for seed in 0 1 2; do
  cells adaptation --pair epfl-vnc short "$seed" \
    "no adaptation" "APMA-Net" "Roels (EN)" "DE feat" "DE pred" "EN + DE feat" "oracle"
done
for seed in 0 1 2; do
  cells generative --table mnist-hard small "$seed" "segmentation only" "AE baseline" proposed
done
for seed in 0 1 2; do
  cells generative --table glas quarter "$seed" m-FCDenseNet "m-FCDenseNet + pyramid" full
done
# What the paper of APMA-Net leaves open, with one seed: the weights, and equation 2 as a sum.
for size in short-lambda-0.1 short-lambda-0.01 short-reconstruction-sum short-reconstruction-1; do
  cells adaptation --pair epfl-vnc "$size" 0 "APMA-Net"
done
for fold in 0 1 2; do
  cells adaptation --pair tnbc-other short "$fold" "oracle" "without self-ensembling" "self-ensembling, as printed" "CBST"
done
