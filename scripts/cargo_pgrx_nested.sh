#!/usr/bin/env bash
# cargo-pgrx as `cargo pgrx test` calls it from inside a test, without the variables that cargo sets for that test.
set -euo pipefail
for name in $(compgen -e); do
  case $name in CARGO_PKG_* | CARGO_MANIFEST_* | CARGO_PRIMARY_PACKAGE | CARGO_CRATE_NAME | OUT_DIR) unset "$name" ;; esac
done
exec cargo-pgrx "$@"
