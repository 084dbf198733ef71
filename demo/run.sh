#!/usr/bin/env bash
# The demo, on a private cluster that stays up afterwards. `make demo` installs and builds what it needs first.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
exec "$RAKAM_PYTHON" "$RAKAM_ROOT/demo/demo.py"
