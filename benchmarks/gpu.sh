#!/bin/sh
# All figures that need a GPU, into the folder that is named; the repository's packages and SAELens must be importable.
set -u
to=${1:?name a folder for the figures}
run() { name=$1; shift; echo "== $name"; timeout "${LIMIT:-240}" python3 -m "$@" 2>&1 | tee "$to/$name.txt" | grep -v Warning; }
run kernels benchmarks.kernels
run step-768 benchmarks.step --device cuda --d 768 --batch 4096 --widths 16384 --profile --to "$to/step-768.json"
