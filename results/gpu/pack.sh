#!/usr/bin/env bash
# Gather what run.sh needs on a machine without a network, in build/gpu: images, and wheels of what is missing there.
#
#     results/gpu/pack.sh TRAIN TEST IMAGES [PACKAGE==VERSION ...]
#
# TRAIN and TEST are the parquet files of CIFAR-10, of the first of which IMAGES are taken. PYTHON_VERSION is that of the
# other machine, by default 3.12.
set -euo pipefail
train=$(realpath "$1") test=$(realpath "$2") images=$3
shift 3
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
mkdir -p build/gpu/data build/gpu/wheels

"$python" - "$train" "$images" << 'CODE'
import sys
import pyarrow.parquet as pq

table = pq.read_table(sys.argv[1]).slice(0, int(sys.argv[2]))
pq.write_table(table, "build/gpu/data/train.parquet", row_group_size=1000)
CODE
cp "$test" build/gpu/data/test.parquet

"$python" -m pip wheel --quiet --no-deps --wheel-dir build/gpu/wheels .
if [ $# -gt 0 ]; then
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest build/gpu/wheels "$@"
fi
du -ch build/gpu/data/* build/gpu/wheels/* $(git ls-files) | tail -n 1
