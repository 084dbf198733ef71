#!/usr/bin/env bash
# Azure Blob Storage on loopback: Azurite, by npm. For runs by hand (README.md).
#   AZURE_PORT       port (default: a free one);  AZURE_CONTAINER  made at the start
# start prints: RAKAM_TEST_URL RAKAM_TEST_OPTIONS RAKAM_TEST_CREDENTIALS
. "$(dirname "$0")/lib.sh"

ACCOUNT=devstoreaccount1
# The key that every Azurite has.
KEY=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==
CONTAINER=${AZURE_CONTAINER:-rakam-test}

install_only() { npmdir azurite azurite@3.35.0; }

# make_container URL: signed with the account's key, as Azure wants it.
make_container() {
  python3 - "$1" "$ACCOUNT" "$KEY" "$CONTAINER" <<'PYTHON'
import base64, datetime, hashlib, hmac, sys, urllib.request
url, account, key, container = sys.argv[1:]
date = datetime.datetime.now(datetime.timezone.utc).strftime("%a, %d %b %Y %H:%M:%S GMT")
version = "2021-12-02"
text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n/{account}/{account}/{container}\nrestype:container"
signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
request = urllib.request.Request(f"{url}/{container}?restype=container", method="PUT", headers={
    "x-ms-date": date, "x-ms-version": version, "Authorization": f"SharedKey {account}:{signature}", "Content-Length": "0"})
urllib.request.urlopen(request, timeout=10)
PYTHON
}

start() {
  local d port
  d=$(install_only)
  port=${AZURE_PORT:-$(free_port)}
  rm -rf "$RUN/azure-data"
  mkdir -p "$RUN/azure-data"
  launch azure "$d/node_modules/.bin/azurite-blob" --blobHost 127.0.0.1 --blobPort "$port" \
    --location "$RUN/azure-data" --disableTelemetry --skipApiVersionCheck
  wait_for azure 60 curl -s "http://127.0.0.1:$port/"
  make_container "http://127.0.0.1:$port/$ACCOUNT"
  cat >"$RUN/azure.env" <<EOF
export RAKAM_TEST_URL=az://$CONTAINER
export RAKAM_TEST_OPTIONS=\$'endpoint=http://127.0.0.1:$port/$ACCOUNT\nallow_http=true'
export RAKAM_TEST_CREDENTIALS=\$'account_name=$ACCOUNT\naccount_key=$KEY'
EOF
}
service azure "$@"
