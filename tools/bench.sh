#!/usr/bin/env bash
# Every scenario in one process, then through a suite on the same settings: bench.sh [MODEL] [FLAGS of penstock bench engine]
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-builtin}
shift || true
penstock=${PENSTOCK:-.venv/bin/penstock}

# What says how an engine is made goes to the suite; what says what is measured goes to its benchmark; what both
# know goes to both, so that a suite that came up otherwise is refused.
made=() measured=() both=()
while (($#)); do
  flag=$1 words=("$1")
  shift
  if [[ $flag == --?* && $flag != *=* && $# -gt 0 && $1 != --* ]]; then
    words+=("$1")
    shift
  fi
  case ${flag%%=*} in
    --threads | --kv-cache-gib | --kv-cache-dtype | --max-batch-tokens | --max-batch-size) made+=("${words[@]}") ;;
    --backend | --dtype | --prefix-cache | --no-prefix-cache) both+=("${words[@]}") ;;
    *) measured+=("${words[@]}") ;;
  esac
done

"$penstock" bench engine "$model" "${made[@]}" "${both[@]}" "${measured[@]}"
exec {up}< <(exec "$penstock" up "$model" "${made[@]}" "${both[@]}" --http 127.0.0.1:0 --grpc 127.0.0.1:0 --log-level warning)
trap 'kill "$!" 2>/dev/null || true' EXIT
read -r -u "$up" line
"$penstock" bench serve --target "grpc://${line##*grpc=}" "${both[@]}" "${measured[@]}"
