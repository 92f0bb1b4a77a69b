#!/usr/bin/env bash
# Every scenario in one process, then through the suite: bench.sh [MODEL] [FLAGS of both]
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-builtin}
shift || true
penstock=.venv/bin/penstock
"$penstock" bench engine "$model" "$@"
exec {up}< <(exec "$penstock" up "$model" --http 127.0.0.1:0 --grpc 127.0.0.1:0 --log-level warning)
trap 'kill "$!" 2>/dev/null || true' EXIT
read -r -u "$up" line
"$penstock" bench serve --target "grpc://${line##*grpc=}" "$@"
