#!/usr/bin/env bash
# Runs `cargo pgrx test`. A normal user may as well type that; root needs what this script adds: a server refuses to run
# as root, so it runs as postgres, in a folder of that user.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$RAKAM_ROOT"
flags=()
if [ "$(id -u)" = 0 ]; then
  folder=$RAKAM_STATE/pgrx-test
  mkdir -p "$folder"
  chown postgres: "$folder"
  flags+=(--runas postgres --pgdata "$folder")
fi
claim_target
cargo pgrx test "pg$(pg_major)" "${flags[@]}" "$@"
