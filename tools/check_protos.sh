#!/usr/bin/env bash
# Fails where the committed messages and stubs differ from what protos/ generates.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
tools/generate_protos.sh "$fresh"
generated() { (cd "$1" && find . -name '*_pb2*' -not -path '*/__pycache__/*' | sort); }
diff <(generated clients/python) <(generated "$fresh") || { echo 'files differ: run make protos' >&2; exit 1; }
generated "$fresh" | while read -r file; do
  diff -u "clients/python/$file" "$fresh/$file" || { echo "$file differs: run make protos" >&2; exit 1; }
done
echo "protos: generated files are up to date"
