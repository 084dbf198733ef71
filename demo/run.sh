#!/usr/bin/env bash
# The demo, on a private cluster that stays up afterwards, with an S3 service, a proxy and Kafka beside it; `demo/run.sh stop`
# stops them. `make demo` installs and builds what it needs first.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../scripts/lib.sh"
if [ "${1:-}" = stop ]; then
  for service in faultproxy s3 kafka; do
    RAKAM_SERVICES_RUN=$RAKAM_STATE/clusters/demo/services "$RAKAM_ROOT/pg_test/services/$service.sh" stop
  done
  exec "$RAKAM_ROOT/scripts/cluster.sh" stop demo
fi
exec "$RAKAM_PYTHON" "$RAKAM_ROOT/demo/demo.py"
