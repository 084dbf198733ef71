#!/usr/bin/env bash
# Builds the extension (RAKAM_PROFILE=release, or dev) and installs it into the private PostgreSQL of that profile.
# The system's PostgreSQL is not touched; a running private server keeps the library it has mapped until it restarts.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$RAKAM_ROOT"

major=$(pg_major)
package=$(mktemp -d "$RAKAM_CACHE/package.XXXXXX")
trap 'rm -rf "$package"' EXIT
prefix=$(server_prefix "$RAKAM_PROFILE")/usr

# place FILE FOLDER: by way of a new file and a rename, because the old one may be mapped by a running server; left alone
# when nothing changed, because a cluster restarts when its library is newer than its server.
place() {
  local target=$2/${1##*/}
  if ! cmp -s "$1" "$target"; then
    cp "$1" "$target.new"
    chmod a+r "$target.new"
    mv "$target.new" "$target"
  fi
}

claim_target
flags=()
[ "$RAKAM_PROFILE" = release ] || flags+=(--debug)
say "building rakam for PostgreSQL $major ($RAKAM_PROFILE; the first time compiles for about $([ "$RAKAM_PROFILE" = release ] && echo 20 || echo 6) minutes on two cores)"
make_server_prefix "$RAKAM_PROFILE"
cargo pgrx package --pg-config "$(pg_config_system "$major")" --out-dir "$package" "${flags[@]}"

while IFS= read -r file; do
  case $file in
    *.so) place "$file" "$prefix/lib/postgresql/$major/lib" ;;
    *.sql | *.control) place "$file" "$prefix/share/postgresql/$major/extension" ;;
  esac
done < <(find "$package" -type f)
say "installed into $prefix"
