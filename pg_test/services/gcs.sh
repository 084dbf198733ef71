#!/usr/bin/env bash
# Google Cloud Storage on loopback: fake-gcs-server, by go. For runs by hand (README.md).
#   GCS_PORT       port (default: a free one);  GCS_BUCKET  made at the start
# start prints: RAKAM_TEST_URL RAKAM_TEST_OPTIONS RAKAM_TEST_CREDENTIALS
. "$(dirname "$0")/lib.sh"

VERSION=v1.52.2
BUCKET=${GCS_BUCKET:-rakam-test}

install_only() {
  local root=$CACHE/fake-gcs-server-$VERSION
  if [ ! -x "$root/fake-gcs-server" ]; then
    GOBIN=$root go install "github.com/fsouza/fake-gcs-server@$VERSION" >&2
  fi
  printf '%s\n' "$root"
}

start() {
  local d port
  d=$(install_only)
  port=${GCS_PORT:-$(free_port)}
  launch gcs "$d/fake-gcs-server" -scheme http -host 127.0.0.1 -port "$port" -backend memory -public-host "127.0.0.1:$port"
  wait_for gcs 30 curl -sf "http://127.0.0.1:$port/storage/v1/b"
  curl -sf -o /dev/null -X POST -H 'Content-Type: application/json' -d "{\"name\": \"$BUCKET\"}" \
    "http://127.0.0.1:$port/storage/v1/b"
  cat >"$RUN/gcs.env" <<EOF
export RAKAM_TEST_URL=gs://$BUCKET
export RAKAM_TEST_OPTIONS=\$'endpoint=http://127.0.0.1:$port\nallow_http=true'
export RAKAM_TEST_CREDENTIALS='service_account_key={"disable_oauth":true,"client_email":"","private_key":"","private_key_id":""}'
EOF
}
service gcs "$@"
