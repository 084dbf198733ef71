#!/usr/bin/env bash
# Stops and removes every private cluster.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[ ! -d "$RAKAM_STATE/clusters/demo" ] || "$RAKAM_ROOT/demo/run.sh" stop
for folder in "$RAKAM_STATE"/clusters/*/; do
  [ -d "$folder" ] || continue
  say "removing cluster $(basename "$folder")"
  "$RAKAM_ROOT/scripts/cluster.sh" destroy "$(basename "$folder")"
done
