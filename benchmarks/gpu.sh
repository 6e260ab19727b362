#!/bin/sh
# All figures that need a GPU, into the folder that is named; the repository's packages and SAELens must be importable.
# Those of steps are added to one file; name kinds after the folder to measure only these.
set -u
to=${1:?name a folder for the figures}
shift
run() {
    name=$1
    shift
    echo "== $name"
    timeout "${LIMIT:-240}" python3 -m "$@" > "$to/$name.txt" 2>&1
    tail -n 24 "$to/$name.txt"
}
step="benchmarks.step --device cuda --batch 4096 --to $to/step_gpu.json"
run gpu-step-2048 $step --d 2048 --k 64 --widths 65536 --kinds ${*:-topk jumprelu gated l1}
run gpu-step-768 $step --d 768 --widths 16384 65536 --kinds ${*:-topk batchtopk matryoshka jumprelu gated l1}
run gpu-step-4096 $step --d 4096 --k 64 --widths 131072 --kinds ${*:-topk l1}
run gpu-kernels benchmarks.kernels
