#!/usr/bin/env bash
# Installs what building and testing rakam needs and this machine lacks (Debian or Ubuntu, as root or with sudo).
# `setup.sh services` installs what the tests' Kafka and Kinesis run on.
# Safe to repeat; takes a second or two when nothing is missing.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
. "$RAKAM_ROOT/pg_test/services/jvm.sh"

pgrx_version=0.18.1
createcluster_conf=/etc/postgresql-common/createcluster.conf

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

apt_install() { as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }

# The packages of the list that are not there yet.
missing() { local package; for package in "$@"; do installed "$package" || echo "$package"; done; }

# The distribution makes and starts a cluster `main` with the server package. Ours are private, so it is told not to,
# for as long as the package is being installed.
install_server() {
  local major=$1 switched=
  installed postgresql-common || apt_install postgresql-common
  if [ -e "$createcluster_conf" ] && ! grep -q '^create_main_cluster' "$createcluster_conf"; then
    as_root sed -i '1i create_main_cluster = false' "$createcluster_conf"
    switched=1
  fi
  apt_install "postgresql-$major" "postgresql-server-dev-$major" || { [ -z "$switched" ] || as_root sed -i 1d "$createcluster_conf"; return 1; }
  [ -z "$switched" ] || as_root sed -i 1d "$createcluster_conf"
}

step_packages() {
  command -v apt-get >/dev/null || die "this script installs with apt-get; elsewhere install PostgreSQL 15 with its headers, clang and Python 3 by hand"
  local wanted=(gcc g++ libc6-dev make curl openssl ca-certificates git sudo clang libclang-dev pkg-config libssl-dev zlib1g-dev)
  command -v python3 >/dev/null || wanted+=(python3)
  python3 -c 'import ensurepip, venv' 2>/dev/null || wanted+=(python3-venv)
  local packages major
  mapfile -t packages < <(missing "${wanted[@]}")
  if [ "${#packages[@]}" -gt 0 ] || [ ! -x "$(pg_config_system "$(pg_major 2>/dev/null || echo 15)")" ]; then
    say "package lists"
    as_root apt-get update -qq
  fi
  if [ "${#packages[@]}" -gt 0 ]; then
    say "packages: ${packages[*]}"
    apt_install "${packages[@]}"
  fi
  major=$(pg_major)
  if [ -n "$(missing "postgresql-$major" "postgresql-server-dev-$major")" ]; then
    say "packages: postgresql-$major postgresql-server-dev-$major"
    install_server "$major"
  fi
  say "PostgreSQL $major and the build packages are there"
}

# version_at_least HAVE WANT
version_at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

step_rust() {
  local want have
  want=$(sed -n 's/^channel = "\(.*\)"$/\1/p' "$RAKAM_ROOT/rust-toolchain.toml")
  have=$(cd "$RAKAM_ROOT" && cargo --version 2>/dev/null | awk '{print $2}') || have=
  if [ -z "$have" ] || ! version_at_least "$have" "$want"; then
    if command -v rustup >/dev/null; then
      say "Rust $want by rustup"
      rustup toolchain install "$want" --profile minimal --component rustfmt --component clippy
    else
      say "rustup and Rust $want"
      curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs |
        sh -s -- -y --no-modify-path --profile minimal --default-toolchain "$want" --component rustfmt --component clippy
    fi
    have=$(cd "$RAKAM_ROOT" && cargo --version | awk '{print $2}')
  fi
  say "Rust $have"
}

step_pgrx() {
  local major
  major=$(pg_major)
  if [ "$(cargo pgrx --version 2>/dev/null | awk '{print $2}')" != "$pgrx_version" ]; then
    say "cargo-pgrx $pgrx_version (compiles for two minutes)"
    CARGO_TARGET_DIR=$RAKAM_CACHE/cargo-pgrx-build cargo install cargo-pgrx --version "$pgrx_version" --locked --debug --force
    rm -rf "$RAKAM_CACHE/cargo-pgrx-build"
  fi
  # cargo-pgrx gets a private PostgreSQL as well, so that `cargo pgrx test` and `install` need no rights on system folders.
  if ! grep -qs "^pg$major *=" "${PGRX_HOME:-$HOME/.pgrx}/config.toml"; then
    make_server_prefix pgrx
    cargo pgrx init "--pg$major" "$(server_bindir pgrx)/pg_config" >/dev/null
  fi
  say "cargo-pgrx $pgrx_version with PostgreSQL $major"
}

step_python() {
  local requirements=$RAKAM_ROOT/pg_test/requirements.txt stamp
  stamp=$(cat "$requirements" <(python3 --version) | sha256sum)
  if [ "$(cat "$RAKAM_CACHE/venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    say "Python packages of pg_test/requirements.txt"
    rm -rf "$RAKAM_CACHE/venv"
    python3 -m venv "$RAKAM_CACHE/venv"
    # Every package is pinned in the file, so nothing else is to be resolved.
    "$RAKAM_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --use-pep517 -r "$requirements"
    echo "$stamp" >"$RAKAM_CACHE/venv/stamp"
  fi
  say "Python environment"
}

# What the services of pg_test/services run on, which fetch themselves by Maven and npm. Not to have them costs the tests
# with Kafka and Kinesis, which say so, and nothing else.
step_services() {
  local wanted=()
  java_at_least 17 >/dev/null || wanted+=(jre)
  command -v mvn >/dev/null || wanted+=(maven)
  command -v npm >/dev/null || wanted+=(npm)
  if [ "${#wanted[@]}" -gt 0 ]; then
    say "packages for Kafka and Kinesis in tests: ${wanted[*]}"
    # In a shell of its own: without root rights as_root ends it.
    (as_root apt-get update -qq && apt_install "${wanted[@]/#jre/$(jre_package)}") ||
      say "not installed: ${wanted[*]}; the tests that need them will be skipped"
  fi
  say "services for tests"
}

# The oldest Java of the distribution that Kafka takes.
jre_package() {
  local version
  for version in 17 21 25; do
    # Not grep -q, as in pg_major.
    if apt-cache policy "openjdk-$version-jre-headless" 2>/dev/null | grep 'Candidate: [0-9]' >/dev/null; then break; fi
  done
  echo "openjdk-$version-jre-headless"
}

mkdir -p "$RAKAM_CACHE" "$RAKAM_STATE"
if [ "$#" -gt 0 ]; then
  for step in "$@"; do "step_$step"; done
  exit
fi
step_packages
step_rust
step_pgrx
step_python
make_server_prefix "$RAKAM_PROFILE"
