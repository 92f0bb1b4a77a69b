#!/usr/bin/env bash
# Generates the Python messages and stubs from protos/ into clients/python: generate_protos.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
out=clients/python
find "$out" -name '*_pb2*' -delete
"$python" -m grpc_tools.protoc --proto_path=protos \
  --plugin=protoc-gen-mypy="$(dirname "$python")/protoc-gen-mypy" \
  --plugin=protoc-gen-mypy_grpc="$(dirname "$python")/protoc-gen-mypy_grpc" \
  --python_out="$out" --grpc_python_out="$out" --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" \
  $(cd protos && find penstock -name '*.proto' | sort)
