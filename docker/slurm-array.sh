#!/usr/bin/env bash
#SBATCH --job-name=histostream
#SBATCH --cpus-per-task=8
#SBATCH --mem=16G
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=histostream-%A_%a.log
# One task for each slide of a list. The list has the word `path` in its first line and then one absolute path a line:
#
#   slides=$(($(wc -l < slides.csv) - 1))
#   sbatch --array=1-"$slides"%50 docker/slurm-array.sh slides.csv results     # at most 50 at a time
#   sbatch --gpus-per-task=1 --array=... docker/slurm-array.sh ...             # with a GPU each
#
# Submit the same line again after a failure or a timeout: finished slides are left out, and an unfinished one continues
# where it stopped. Slurm sends SIGTERM two minutes before the time is over; histo-infer then finishes the strip in hand and
# stops. At the end, `histo-infer slides.csv --out results` writes results/cohort.csv, the table of all slides.
set -euo pipefail
list=$1
out=$2
slide=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$list")
if [[ -z $slide ]]; then
  echo "$list has no slide number $SLURM_ARRAY_TASK_ID" >&2
  exit 1
fi
# In a container: exec apptainer run --nv histostream.sif "$slide" ...
exec histo-infer "$slide" --out "$out" --threads "${SLURM_CPUS_PER_TASK:-1}"
