#!/bin/sh
# All that only a GPU can tell, into runs/bench/gpu; each part ends after 10 minutes at the latest.
#   benchmarks/run_on_gpu.sh            Stable Diffusion 2.1's true size, random weights
#   benchmarks/run_on_gpu.sh tiny       the same parts at tiny width: starts on a CPU
size=${1:-sd21}
out=${2:-runs/bench/gpu}
python=${PYTHON:-.venv/bin/python}
failed=0
for part in ladder batches steady capped precision; do
    timeout 600 "$python" -W ignore -m benchmarks.gpu "$part" --size "$size" --out "$out" || { echo "$part failed"; failed=1; }
done
timeout 600 "$python" -W ignore -m benchmarks.training --size "$size" --batch 8 --out "$out/training.json" ||
    { echo "training failed"; failed=1; }
exit $failed
