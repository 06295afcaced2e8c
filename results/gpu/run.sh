#!/usr/bin/env bash
# Tests, the benchmark of steps and trainings on a GPU, in so many minutes: see README.md beside this.
#
#     results/gpu/run.sh MINUTES [DATA]
#
# DATA is a folder with train.parquet and test.parquet, by default build/gpu/data. Results go to $OUT, by default out.
# Relative paths are relative to the root of the project.
# Whatever does not fit into its share of the time is cut off, and summary.txt says so.
set -uo pipefail
cd "$(dirname "$0")/../.."

minutes=${1:?usage: results/gpu/run.sh MINUTES [DATA]}
data=${2:-build/gpu/data}
out=${OUT:-out}
python=${PYTHON:-python3}
end=$(($(date +%s) + minutes * 60))
mkdir -p "$out"

# The package that travels in the wheels only says which version this is: the code is that of this folder.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
wheels=(build/gpu/wheels/*.whl)
if [ -e "${wheels[0]}" ]; then
  "$python" -m pip install --quiet --no-index --no-deps --target "$site" "${wheels[@]}" || exit 1
fi
export PYTHONPATH="$PWD/src:$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ "${CRATE_MAE_GPU_REHEARSAL:-}" = cpu ]; then  # everything, of the smallest size
  steps=("nano 4") rounds=2 train=(--cpu --batch 32 --images 500 --test-images 200)
else
  "$python" -c "import torch; assert torch.cuda.is_available()" || { echo "There is no GPU." >&2; exit 1; }
  steps=("base 256" "large 128") rounds=9 train=()
fi

say() { echo "$*" | tee -a "$out/summary.txt"; }

# stage NAME PERCENT COMMAND...: at most this share of all minutes, and never longer than what is left of them
stage() {
  local name=$1 limit=$((minutes * 60 * $2 / 100)) left=$((end - $(date +%s))) began
  shift 2
  [ "$limit" -lt "$left" ] || limit=$left
  [ "$limit" -gt 0 ] || { say "$name: not begun, no time was left"; return; }
  began=$(date +%s)
  timeout --signal=INT --kill-after=20 "$limit" env --default-signal=INT "$@" >> "$out/$name.txt" 2>&1
  case $? in
    0) say "$name: finished in $(($(date +%s) - began)) s" ;;
    124 | 137) say "$name: cut off after $limit s" ;;
    *) say "$name: FAILED after $(($(date +%s) - began)) s" ;;
  esac
  tail -n 3 "$out/$name.txt"
}

say "$(date --iso-8601=seconds) results/gpu/run.sh $minutes, ${CRATE_MAE_GPU_REHEARSAL:+a rehearsal on the }${CRATE_MAE_GPU_REHEARSAL:-on a GPU}"
several=()
"$python" -c "import xdist" 2> /dev/null && several=(-n "$(($(nproc) < 4 ? 0 : 4))")
stage tests 25 "$python" -m pytest tests/gpu -m gpu -v -p no:cacheprovider -o filterwarnings=default \
  "${several[@]}" --junitxml "$out/tests.xml"
for each in "${steps[@]}"; do
  read -r size batch <<< "$each"
  stage "steps_$size" 20 "$python" -m benchmarks.steps --machine gpu --sizes "$size" --batch "$batch" --tasks training \
    --precisions bfloat16 --rounds "$rounds" --out "$site"
done
left=$((end - $(date +%s) - 15))
stage train 100 "$python" results/gpu/train.py "$data/train.parquet" "$data/test.parquet" "$out" --seconds "$left" "${train[@]}"
say "$(date --iso-8601=seconds) finished"
