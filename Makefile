# What a newcomer types. Each target is a script in scripts/ or demo/, which says what it does.
# RAKAM_PROFILE=dev builds in seconds after a change and runs slower; RAKAM_CACHE moves everything that is built.

.PHONY: help setup services build demo test check fuzz pgrx-test bench install clean-cluster

help:
	@echo 'make demo           install what is missing, build, load real events, show what rakam does'
	@echo 'make test           all tests;  make check: only those that need no server'
	@echo 'make fuzz           every decoder and parser on arbitrary input, RAKAM_FUZZ_SECONDS (600) each'
	@echo 'make pgrx-test      cargo pgrx test (as a normal user, or as root through the user postgres)'
	@echo 'make bench          ratios against heap tables and DuckDB, see benches/README.md'
	@echo 'make build          the extension, into a private PostgreSQL;  make install: into the system'"'"'s'
	@echo 'make clean-cluster  stop and remove the private clusters'

setup:
	scripts/setup.sh

services: setup
	scripts/setup.sh services

build: setup
	scripts/build.sh

demo: build services
	demo/run.sh

test: services
	scripts/test.sh

check: setup
	scripts/test.sh fmt clippy crates rules

fuzz: setup
	scripts/fuzz.sh

pgrx-test: setup
	scripts/pgrx_test.sh

bench: build
	benches/sql/run.sh

install: setup
	scripts/install.sh

clean-cluster:
	scripts/clean_clusters.sh
