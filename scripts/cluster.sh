#!/usr/bin/env bash
# Private clusters: scripts/cluster.sh start|stop|restart|destroy|psql|env|log NAME [setting=value … | -- psql arguments]
# The work is done by pg_test/harness/cluster.py, which the tests use as a class.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec python3 "$RAKAM_ROOT/pg_test/harness/cluster.py" "$@"
