#!/usr/bin/env bash
# Installs the release build into the system's PostgreSQL (through sudo for a normal user). A server that runs with the
# extension keeps the old library until it is restarted.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$RAKAM_ROOT"
flags=(--release --pg-config "$(pg_config_system "$(pg_major)")")
[ "$(id -u)" = 0 ] || flags+=(--sudo)
claim_target
cargo pgrx install "${flags[@]}"
