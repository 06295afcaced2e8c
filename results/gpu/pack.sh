#!/usr/bin/env bash
# Gather what run.sh needs on a machine without a network, in build/gpu: images, and wheels of what is missing there.
#
#     results/gpu/pack.sh TRAIN TEST [PACKAGE ...]
#
# TRAIN and TEST are the parquet files of CIFAR-10, which are compressed. PYTHON_VERSION is that of the other machine, by
# default 3.12.
set -euo pipefail
train=$(realpath "$1") test=$(realpath "$2")
shift 2
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
rm -rf build/gpu
mkdir -p build/gpu/data build/gpu/wheels

"$python" - "$train" "$test" << 'CODE'
import sys
import pyarrow.parquet as pq

for part, path in zip(("train", "test"), sys.argv[1:], strict=True):
    pq.write_table(pq.read_table(path), f"build/gpu/data/{part}.parquet", row_group_size=1000, compression="zstd")
CODE

"$python" -m pip wheel --quiet --no-deps --wheel-dir build/gpu/wheels .
if [ $# -gt 0 ]; then
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest build/gpu/wheels "$@"
fi
git ls-files -z | xargs -0 du -ch build/gpu/data build/gpu/wheels | tail -n 1
