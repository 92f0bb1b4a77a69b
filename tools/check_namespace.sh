#!/usr/bin/env bash
# Fails where a level of the penstock namespace that several source roots share has an __init__.py: it would hide the other roots.
set -euo pipefail
cd "$(dirname "$0")/.."
found=$(find services backends clients/python \
  -path '*/penstock/__init__.py' -o -path '*/penstock/v1/__init__.py' -o -path '*/penstock/internal/__init__.py' \
  -o -path '*/penstock/internal/v1/__init__.py')
if [ -n "$found" ]; then
  printf 'these hide the other roots of the namespace:\n%s\n' "$found" >&2
  exit 1
fi
echo "namespace: no __init__.py on shared levels"
