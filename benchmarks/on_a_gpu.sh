#!/usr/bin/env bash
# Measures the library on one GPU in about 15 minutes. In a checkout, in an environment with
# `pip install -e '.[experiments]' 'jax[cuda12]'`:
#
#     bash benchmarks/on_a_gpu.sh benchmarks/results/h100
#
# To try the script on a CPU, where the benchmarks then only check their results:
#
#     bash benchmarks/on_a_gpu.sh /tmp/out --quick
#
# A part that fails or takes too long is named at the end, and the others go on.
set -uo pipefail
out=$1
quick=${2:-}
mkdir -p "$out"
failed=()

# part SECONDS NAME COMMAND...: runs a command, with its output in NAME.log.
part() {
  printf '== %s (%s s)\n' "$2" "$SECONDS"
  timeout "$1" "${@:3}" > "$out/$2.log" 2>&1 || failed+=("$2")
}

if [ -n "$quick" ]; then
  network=()
  training=(--model lenet-300-100 --steps 40 --seeds 1)
else
  network=(--model resnet-50 --size 224 --channels 3 --batch-size 128
    --precision bfloat16 --steps 120 --rounds 3)
  training=(--model resnet-20 --steps 600 --seeds 3)
fi

python -c 'import jax; print(jax.devices())' | tee "$out/devices.log"
# Exact selection next to lax.top_k and sorting, and whole mask updates.
part 240 selection python -m benchmarks.selection --out "$out" $quick
# Steps between updates, next to the dense optimizer; compile times.
part 180 optimizer_step python -m benchmarks.optimizer_step --out "$out" $quick
# ResNet-50 for ImageNet in bfloat16, dense and with GraNet.
part 240 throughput python -m benchmarks.throughput "${network[@]}" --out "$out" $quick
# Short trainings on the bundled digits: one program, and one per device.
part 120 train-jit python -m experiments.train "${training[@]}" --no-progress \
  --out "$out/train-jit"
part 120 train-pmap python -m experiments.train "${training[@]}" --no-progress \
  --parallel pmap --out "$out/train-pmap"

printf 'done in %s s; results in %s\n' "$SECONDS" "$out"
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'failed: %s (see the logs)\n' "${failed[*]}"
  exit 1
fi
