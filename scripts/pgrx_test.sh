#!/usr/bin/env bash
# Runs `cargo pgrx test`. A normal user may as well type that; root needs what this script adds: a server refuses to run
# as root, so it runs as postgres, in a folder of that user.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$RAKAM_ROOT"
# cargo-pgrx installs the extension once more from within the test. Variables that cargo sets for tests would make
# build scripts of dependencies run again, and everything behind them be compiled twice.
export CARGO_PGRX=$RAKAM_ROOT/scripts/cargo_pgrx_nested.sh
flags=()
if [ "$(id -u)" = 0 ]; then
  folder=$RAKAM_STATE/pgrx-test
  mkdir -p "$folder"
  chown postgres: "$folder"
  flags+=(--runas postgres --pgdata "$folder")
fi
cargo pgrx test "pg$(pg_major)" "${flags[@]}" "$@"
