#!/usr/bin/env bash
# Fuzzes the crates: scripts/fuzz.sh [TARGET…], all targets of fuzz/ by default, one after the other.
#   RAKAM_FUZZ_SECONDS   how long each runs (600)
# A crash, a panic, an input that takes longer than 25 seconds, or that makes a decoder take more memory than the limits
# below, ends its target; the others still run. Exit status 1 when there was any.
#
# What a run has learnt (its corpus) is kept in $RAKAM_CACHE/fuzz, so that the next goes on from there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$RAKAM_ROOT"

# Sanitizers are an unstable flag of the compiler (-Zsanitizer), hence a nightly: one date, so that every run is of the same
# compiler; younger than the Rust of rust-toolchain.toml, whose code it has to understand.
nightly='nightly-2026-05-20'
# What `rustc --version` says of it: the day before.
nightly_date=2026-05-19
cargo_fuzz_version=0.13.2

seconds=${RAKAM_FUZZ_SECONDS:-600}
state=$RAKAM_CACHE/fuzz
# Not the folder of the other builds: every crate is compiled with other flags.
export CARGO_TARGET_DIR=$state/target

install_tools() {
  # A nightly of this date under another name serves as well.
  if ! rustc "+$nightly" --version >/dev/null 2>&1; then
    if rustc +nightly --version 2>/dev/null | grep -q "$nightly_date"; then
      nightly=nightly
    else
      say "Rust $nightly by rustup"
      rustup toolchain install "$nightly" --profile minimal
    fi
  fi
  if [ "$(cargo fuzz --version 2>/dev/null | awk '{print $2}')" != "$cargo_fuzz_version" ]; then
    say "cargo-fuzz $cargo_fuzz_version (compiles for a minute or two)"
    CARGO_TARGET_DIR=$state/cargo-fuzz-build cargo install cargo-fuzz --version "$cargo_fuzz_version" --locked --debug --force
    rm -rf "$state/cargo-fuzz-build"
  fi
}

# cargo-fuzz has no option for a locked build: the versions are those of fuzz/Cargo.lock, or the build is refused before.
# With -O the debug assertions are those of the profile in fuzz/Cargo.toml: of our crates only.
build() {
  cargo "+$nightly" metadata --manifest-path fuzz/Cargo.toml --locked --format-version 1 >/dev/null ||
    die "fuzz/Cargo.lock does not fit: run cargo metadata --manifest-path fuzz/Cargo.toml once and look at what changed"
  cargo "+$nightly" fuzz build -O --fuzz-dir fuzz --target-dir "$CARGO_TARGET_DIR"
}

# dictionary TARGET: the option that names its dictionary, if it has one.
dictionary() {
  case $1 in
    event | text) echo "-dict=fuzz/dictionaries/json.dict" ;;
    avro | files) echo "-dict=fuzz/dictionaries/avro.dict" ;;
  esac
}

# longest TARGET: bytes of its longest input. Files and what is stored have heads of a kilobyte or more.
longest() {
  case $1 in
    files | stored) echo 16384 ;;
    *) echo 4096 ;;
  esac
}

# fuzz TARGET
fuzz() {
  local options target=$1 log=$state/logs/$1.log corpus=$state/corpus/$1 seeds=$state/seeds/$1 crashes=$state/crashes/$1
  mapfile -t options < <(dictionary "$target")
  rm -rf "$seeds"
  mkdir -p "$seeds" "$corpus" "$crashes" "$state/logs"
  # The limits are generous for inputs of a few kilobytes: decompression may expand one a thousand times, no more.
  RAKAM_FUZZ_SEEDS=$seeds TMPDIR=$scratch ASAN_OPTIONS=detect_odr_violation=0 "$binaries/$target" \
    -max_total_time="$seconds" -timeout=25 -rss_limit_mb=2048 -malloc_limit_mb=512 -max_len="$(longest "$target")" \
    -print_final_stats=1 -artifact_prefix="$crashes/" "${options[@]}" "$corpus" "$seeds" >"$log" 2>&1
}

# closing TARGET SECONDS: executions and coverage, from its log.
closing() {
  local log=$state/logs/$1.log executions last
  executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log" | tail -n 1)
  last=$(grep -oE 'cov: [0-9]+ ft: [0-9]+ corp: [0-9]+' "$log" | tail -n 1)
  printf '%-8s %12s executions in %4s s   %s' "$1" "${executions:-?}" "$2" "${last:-no coverage}"
}

targets=("$@")
[ "${#targets[@]}" -gt 0 ] || mapfile -t targets < <(sed -n 's/^path = "bin\/\(.*\)\.rs"$/\1/p' fuzz/Cargo.toml)
for target in "${targets[@]}"; do
  [ -f "fuzz/bin/$target.rs" ] || die "no fuzz target \"$target\": there are $(cd fuzz/bin && echo *.rs | sed 's/\.rs//g')"
done
mkdir -p "$state"
install_tools
say "building the targets in $CARGO_TARGET_DIR"
build
binaries=$CARGO_TARGET_DIR/$(rustc "+$nightly" -vV | sed -n 's/^host: //p')/release
memory=/dev/shm
[ -w "$memory" ] || memory=${TMPDIR:-/tmp}
scratch=$(mktemp -d "$memory/rakam-fuzz.XXXXXX")
trap 'rm -rf "$scratch"' EXIT

failed=0
for target in "${targets[@]}"; do
  say "$target, for $seconds s (log: $state/logs/$target.log)"
  began=$SECONDS
  if fuzz "$target"; then
    printf '%s   no crash\n' "$(closing "$target" $((SECONDS - began)))"
  else
    failed=1
    printf '%s   FAILED\n' "$(closing "$target" $((SECONDS - began)))"
    input=$(sed -n 's/.*Test unit written to //p' "$state/logs/$target.log" | tail -n 1)
    if [ -n "$input" ]; then
      echo "  input:  $input"
      echo "  repeat: RUST_BACKTRACE=1 $binaries/$target $input"
    else
      tail -n 20 "$state/logs/$target.log"
    fi
  fi
done
exit "$failed"
