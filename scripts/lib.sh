# Settings and helpers that every script here reads first: where things live, which PostgreSQL, how to say what is going on.
# shellcheck shell=bash

RAKAM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# What is built and downloaded: compiler output, the Python environment, data sets.
RAKAM_CACHE=${RAKAM_CACHE:-$HOME/.cache/rakam}

# What a server reads and writes: the private PostgreSQL with the extension, the clusters. A server never runs as root, so
# for root this is a folder that the user postgres can reach, which root's home is not.
if [ "$(id -u)" = 0 ]; then
  RAKAM_STATE=${RAKAM_STATE:-/var/cache/rakam}
else
  RAKAM_STATE=${RAKAM_STATE:-$RAKAM_CACHE/state}
fi

# `release` is what the demo, the tests and the benchmarks run; `dev` builds in seconds after a change.
RAKAM_PROFILE=${RAKAM_PROFILE:-release}
export RAKAM_PYTHON=$RAKAM_CACHE/venv/bin/python

# An empty RUSTFLAGS keeps cargo-pgrx from injecting its own, with which it and plain cargo rebuild everything in turn.
export RUSTFLAGS=
export CARGO_TARGET_DIR=${RAKAM_TARGET_DIR:-$RAKAM_CACHE/target}
export RAKAM_ROOT RAKAM_CACHE RAKAM_STATE RAKAM_PROFILE
export PATH=$HOME/.cargo/bin:$PATH
# With a backtrace in its environment a server puts one into the DETAIL of every error.
unset RUST_BACKTRACE

case $RAKAM_PROFILE in
  release | dev) ;;
  *) echo "RAKAM_PROFILE is \"$RAKAM_PROFILE\"; it must be release or dev" >&2; exit 2 ;;
esac

# A toolchain that is the pinned release under another name (stable, say) serves: rustup need not download it again.
if [ -z "${RUSTUP_TOOLCHAIN:-}" ] && command -v rustup >/dev/null; then
  pinned=$(sed -n 's/^channel = "\(.*\)"$/\1/p' "$RAKAM_ROOT/rust-toolchain.toml")
  if ! compgen -G "${RUSTUP_HOME:-$HOME/.rustup}/toolchains/$pinned-*/bin/cargo" >/dev/null &&
    [ "$(cd / && rustc --version 2>/dev/null | awk '{print $2}')" = "$pinned" ]; then
    RUSTUP_TOOLCHAIN=$(cd / && rustup show active-toolchain | awk '{print $1}')
    export RUSTUP_TOOLCHAIN
  fi
fi

# claim_target: before cargo runs. Two checkouts share one target folder, and cargo, which looks at the age of files only,
# would take what the other one has compiled since for ours.
claim_target() {
  mkdir -p "$CARGO_TARGET_DIR"
  if [ "$(cat "$CARGO_TARGET_DIR/checkout" 2>/dev/null)" != "$RAKAM_ROOT" ]; then
    find "$RAKAM_ROOT/src" "$RAKAM_ROOT/crates" "$RAKAM_ROOT/sql" -type f -exec touch {} +
    echo "$RAKAM_ROOT" >"$CARGO_TARGET_DIR/checkout"
  fi
}

# say TEXT...: one line of progress.
say() { printf '\033[1m==>\033[0m %s\n' "$*"; }

# die TEXT...: the reason, and out.
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# as_root COMMAND...: directly as root, through sudo otherwise.
as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "this needs root rights (or sudo): $*"
  fi
}

# pg_major: the PostgreSQL to use. RAKAM_PG_MAJOR decides; else 15 where it is installed or can be installed, else the
# first newer one of which the same is true.
pg_major() {
  local major
  if [ -n "${RAKAM_PG_MAJOR:-}" ]; then echo "$RAKAM_PG_MAJOR"; return; fi
  for major in 15 16 17 18; do
    if [ -x "/usr/lib/postgresql/$major/bin/pg_config" ]; then echo "$major"; return; fi
  done
  # Not grep -q: it would end at once and apt-cache die of SIGPIPE, which pipefail takes for a failure.
  for major in 15 16 17 18; do
    if apt-cache policy "postgresql-server-dev-$major" 2>/dev/null | grep 'Candidate: [0-9]' >/dev/null; then echo "$major"; return; fi
  done
  die "no PostgreSQL 15 to 18 in this distribution's packages; see https://wiki.postgresql.org/wiki/Apt"
}

# pg_config_system MAJOR: the pg_config of the distribution's packages.
pg_config_system() { echo "/usr/lib/postgresql/$1/bin/pg_config"; }

# server_prefix NAME: a private copy of PostgreSQL below the state folder; NAME is a profile, or `pgrx` for cargo-pgrx.
server_prefix() { echo "$RAKAM_STATE/postgresql-$(pg_major)/$1"; }

# server_bindir NAME: where that copy has its programs.
server_bindir() { echo "$(server_prefix "$1")/usr/lib/postgresql/$(pg_major)/bin"; }

# make_server_prefix NAME: makes that copy. PostgreSQL finds its folders relative to its own program, so a copy of the
# programs beside links to everything else is a complete installation with an extension folder of its own: nothing is
# installed into the system, no root rights are needed, and no running server of the system can be touched.
make_server_prefix() {
  local major prefix lib share
  major=$(pg_major)
  prefix=$(server_prefix "$1")/usr
  lib=lib/postgresql/$major
  share=share/postgresql/$major
  if cmp -s "/usr/$lib/bin/postgres" "$prefix/$lib/bin/postgres"; then return; fi
  mkdir -p "$prefix/$lib/lib" "$prefix/$share/extension" "$prefix/include"
  rm -rf "${prefix:?}/$lib/bin"
  cp -a "/usr/$lib/bin" "$prefix/$lib/bin"
  ln -sf "/usr/$lib"/lib/* "$prefix/$lib/lib/"
  find "/usr/$share" -mindepth 1 -maxdepth 1 ! -name extension -exec ln -sfn -t "$prefix/$share" {} +
  ln -sf "/usr/$share"/extension/* "$prefix/$share/extension/"
  ln -sfn /usr/include/postgresql "$prefix/include/postgresql"
  chmod -R a+rX "$RAKAM_STATE/postgresql-$major"
}
