#!/usr/bin/env bash
# Generates the Python messages and stubs from protos/: generate_protos.sh [FOLDER], by default into clients/python.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-clients/python}
bin=.venv/bin
find "$out" -name '*_pb2*' -delete
"$bin/python" -m grpc_tools.protoc --proto_path=protos \
  --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
  --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  $(cd protos && find penstock -name '*.proto' | sort)
