#!/usr/bin/env bash
# Ratio benchmarks on a private cluster of their own; arguments go to run.py (--help names them).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"
exec "$RAKAM_PYTHON" "$RAKAM_ROOT/benches/sql/run.py" "$@"
