#!/usr/bin/env bash
# Build the images and segment a synthetic slide with each: docker/build.sh [cpu] [cuda]
set -euo pipefail
cd "$(dirname "$0")/.."
if ! docker info >/dev/null 2>&1; then
  echo "docker/build.sh: no Docker engine answers; install Docker or start it" >&2
  exit 1
fi
images=("$@")
((${#images[@]})) || images=(cpu cuda)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for image in "${images[@]}"; do
  docker build --file "docker/$image.Dockerfile" --tag "histostream:$image" .
  # A container without a network, as any user.
  run=(docker run --rm --network none --user "$(id -u):$(id -g)" --volume "$scratch:/data")
  if [[ $image == cuda ]] && command -v nvidia-smi >/dev/null; then
    run+=(--gpus all)
  fi
  "${run[@]}" "histostream:$image" --help
  "${run[@]}" --entrypoint python "histostream:$image" \
    -m histostream.wsi.synthetic "$image.tif" --size 1024x1024
  "${run[@]}" "histostream:$image" "$image.tif" --out results
  test -s "$scratch/results/$image/labels.tif"

  # The same as a task of the Digital Slide Archive.
  docker build --file docker/dsa.Dockerfile --tag "histostream:dsa-$image" --build-arg "BASE=histostream:$image" docker
  "${run[@]}" "histostream:dsa-$image" --list_cli
  "${run[@]}" "histostream:dsa-$image" histo-infer --xml
  "${run[@]}" "histostream:dsa-$image" histo-infer "/data/$image.tif" "/data/$image.anot"
  test -s "$scratch/$image.anot"
done
