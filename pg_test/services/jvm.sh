# shellcheck shell=bash
# Which Java there is. Source it; scripts/setup.sh does as well.

# java_at_least VERSION: an installed java of that version or a newer one; fails where there is none.
java_at_least() {
  local java version
  for java in "${JAVA_HOME:-/nonexistent}/bin/java" "$(command -v java || true)" /usr/lib/jvm/*/bin/java; do
    [ -x "$java" ] || continue
    version=$("$java" -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p')
    if [ "${version:-0}" -ge "$1" ]; then printf '%s\n' "$java"; return; fi
  done
  return 1
}
