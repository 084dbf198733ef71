#!/usr/bin/env bash
# Runs the tests: scripts/test.sh [PHASE…], all phases by default, in this order:
#   fmt clippy crates rules     need no server
#   build                       the extension, into the private PostgreSQL of RAKAM_PROFILE
#   regress isolation e2e       need the build
# Each phase's output is shown as it comes and kept; the end repeats the closing lines of each. Exit status 1 when any failed.
# Phases are called by their names.
# shellcheck disable=SC2317
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
cd "$RAKAM_ROOT" || exit 1

logs=$RAKAM_CACHE/test-logs
mkdir -p "$logs"
crates=(-p rakam-event -p rakam-lake -p rakam-engine -p rakam-files -p rakam-mappers -p rakam-sources)

# Workspaces of their own.
others=(fuzz/Cargo.toml benches/counter/Cargo.toml)

phase_fmt() {
  local manifest
  cargo fmt --all --check || return
  for manifest in "${others[@]}"; do cargo fmt --manifest-path "$manifest" --check || return; done
  echo "formatting is as rustfmt has it"
}

phase_clippy() {
  local manifest
  cargo clippy --workspace --all-targets --no-default-features --features "pg$(pg_major) pg_test" -- -D warnings || return
  # Nothing else notices that their locks do not fit any more.
  for manifest in "${others[@]}"; do
    cargo metadata --manifest-path "$manifest" --locked --format-version 1 >/dev/null || return
  done
}

phase_crates() { cargo test "${crates[@]}"; }

# The rules need nothing but the standard library: compiled alone they do not wait for the extension's build.
phase_rules() {
  local binary=$RAKAM_CACHE/dependency_rules
  CARGO_MANIFEST_DIR=$RAKAM_ROOT rustc --edition 2024 --test tests/dependency_rules.rs -o "$binary" && "$binary"
}

phase_build() { scripts/build.sh; }

# The cluster of the regression tests; pg_regress and the isolation tester connect to it as its superuser.
regress() {
  local runner=$1 status=0 output=$logs/$2
  shift 2
  rm -rf "$output"
  mkdir -p "$output"
  scripts/cluster.sh destroy regress
  scripts/cluster.sh start regress rakam.digest_max_age=1s || return 1
  (
    eval "$(scripts/cluster.sh env regress)"
    "$runner" --inputdir=pg_test --outputdir="$output" --bindir="$(server_bindir "$RAKAM_PROFILE")" \
      --host="$PGHOST" --port="$PGPORT" --user="$PGUSER" --load-extension=rakam --dbname=regression "$@"
  ) || status=1
  [ "$status" = 0 ] || cat "$output/regression.diffs"
  scripts/cluster.sh destroy regress
  return "$status"
}

# names FOLDER SUFFIX: the tests of a folder, without path and suffix.
names() { find "pg_test/$1" -name "*.$2" -printf '%f\n' | sed "s/\.$2\$//" | sort; }

phase_regress() {
  local tests
  mapfile -t tests < <(names sql sql)
  regress "$(pgxs_tests)/regress/pg_regress" regress "${tests[@]}"
}

phase_isolation() {
  local tests
  mapfile -t tests < <(names specs spec)
  regress "$(pgxs_tests)/isolation/pg_isolation_regress" isolation "${tests[@]}"
}

pgxs_tests() { echo "/usr/lib/postgresql/$(pg_major)/lib/pgxs/src/test"; }

# Two files at a time: they wait more than they compute.
phase_e2e() { "$RAKAM_PYTHON" -m pytest -c pg_test/pytest.ini --rootdir pg_test pg_test/e2e -v -n 2 --dist loadfile; }

# closing PHASE: what its output ends with.
closing() {
  case $1 in
    crates | rules) grep -E '^test result' "$logs/$1.log" ;;
    regress | isolation) grep -E '^ .*tests? (passed|failed)' "$logs/$1.log" ;;
    *) grep -v '^[[:space:]]*$' "$logs/$1.log" | tail -n 1 ;;
  esac
}

phases=("$@")
[ "${#phases[@]}" -gt 0 ] || phases=(fmt clippy crates rules build regress isolation e2e)
claim_target
declare -A outcome
failed=0
for phase in "${phases[@]}"; do
  declare -F "phase_$phase" >/dev/null || die "no phase \"$phase\"; there are fmt clippy crates rules build regress isolation e2e"
done
for phase in "${phases[@]}"; do
  say "$phase"
  case $phase in
    regress | isolation | e2e)
      if [ "${outcome[build]:-ok}" != ok ]; then
        outcome[$phase]="not run: the build failed"
        continue
      fi
      ;;
  esac
  began=$SECONDS
  if "phase_$phase" 2>&1 | tee "$logs/$phase.log"; then
    outcome[$phase]=ok
  else
    outcome[$phase]=FAILED
    failed=1
  fi
  outcome[seconds-$phase]=$((SECONDS - began))
done

say "summary (logs in $logs)"
for phase in "${phases[@]}"; do
  printf '%-10s %-8s %4s s\n' "$phase" "${outcome[$phase]}" "${outcome[seconds-$phase]:--}"
  if [ -n "${outcome[seconds-$phase]:-}" ]; then closing "$phase" | sed 's/^/             /'; fi
done
exit "$failed"
