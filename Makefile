# The commands of sfparallel's developers and first-time users; `make help` lists them.
SHELL := /bin/sh
BIN := .venv/bin
RUFF := $(BIN)/ruff check --quiet --line-length 130 --target-version py311 --select E,F,W,I,B,UP,SIM,RUF
SOURCES := sfparallel examples tests benchmarks tools setup.py

RENDER_PACKAGES := --package povray --package povray-examples --package python3-pil --package python3-rich
ML_IMAGE := $(BIN)/sf image build ml --pip joblib --pip scikit-learn --pip pandas --pip pytest --pip hypothesis
BENCH_IMAGE := --package mpich --pip mpi4py==4.1.2 --pip loky --pip distributed --pip ray

BEGAN := $(shell date +%s)

.PHONY: help build dist man bench-tools demo example-render test test-long test-kvm test-matrix lint \
	bench bench-fork bench-comm bench-map bench-start bench-kvm clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

build: ## install what is needed, build the native parts (quick when there is nothing to do)
	@tools/prepare
	@[ "$(MAKECMDGOALS)" != build ] || echo 'built; next: . .venv/bin/activate, then sf doctor, then sf image build'

dist: build ## sdist, and from it a wheel with the native parts built, in dist/
	@rm -rf dist
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || date +%s) $(BIN)/python -m build --outdir dist . >/dev/null
	@ls dist/*

man: build ## write the manual pages anew, from the parsers of the commands
	@$(BIN)/python tools/manpages.py docs/man

demo: build ## build the guest image of the example, then run BLAST in clones of a VM
	@$(BIN)/sf image build blast --package ncbi-blast+ --package mmseqs2-examples
	@$(BIN)/sfrun -v -n 4 --image blast --stats examples/blast/blast.py --output examples/blast/out

example-render: build ## build the guest image of the example, then render with POV-Ray in clones of a VM
	@$(BIN)/sf image build render $(RENDER_PACKAGES)
	@$(BIN)/sfrun -n 4 --image render examples/render/render.py --output examples/render/out

bench-tools: build
	@tools/prepare bench

test: lint bench-tools ## lint, type check, all tests (real VMs; about 45 minutes on 2 cores); says when `test-kvm` ran last
	@$(BIN)/python -m tests.kvm --last
	@$(BIN)/sf image build default
	@$(BIN)/sf image build blast --package ncbi-blast+ --package mmseqs2-examples
	@$(ML_IMAGE)
	@$(BIN)/sf image build numba --pip numba
	@$(BIN)/sf image build render $(RENDER_PACKAGES)
	@$(BIN)/pytest
	@$(BIN)/python -m tests.kvm --if-due $(BEGAN)

test-kvm: build ## tests of VMs under a real KVM, in a VM with an emulated AMD processor (hours); ARGS=--smoke, ARGS="--seconds N"
	@$(BIN)/sf image build default
	@$(BIN)/python -m tests.kvm $(ARGS)

test-long: bench-tools ## more tests of numpy, scipy, pandas, joblib and mpi4py themselves; not part of `test`
	@$(ML_IMAGE)
	@$(BIN)/pytest -m long

test-matrix: dist ## the wheel on clean roots of Debian 12 and 13, in chroots; ARGS=trixie, TESTS="test_fork test_spmd"
	@tools/test-matrix $(ARGS)

lint: build ## ruff and mypy
	@$(RUFF) $(SOURCES)
	@$(BIN)/mypy

bench: bench-fork bench-comm bench-map bench-start ## all benchmarks

bench-fork: bench-tools ## figures of the fork: data, pictures, tables (20 minutes on 2 cores); ARGS="--part pause", ARGS=--quick, ARGS=--draw
	@$(BIN)/sf image build default
	@$(BIN)/python -m benchmarks.fork $(ARGS)

bench-start: bench-tools ## start of a job by core, with cold and warm caches (1 minute on 2 cores); ARGS=--quick, ARGS=--draw
	@$(BIN)/python -m benchmarks.start $(ARGS)

bench-kvm: build ## instructions and VM exits of a fork under KVM, in the outer VM of `test-kvm` (10 minutes or more)
	@$(BIN)/sf image build default
	@$(BIN)/python -m tests.kvm.counts

bench-comm: bench-tools ## messages among clones next to mpi4py on MPICH: data and pictures (14 minutes on 2 cores); ARGS=--quick, ARGS=--draw
	@$(BIN)/sf image build bench $(BENCH_IMAGE)
	@$(BIN)/python -m benchmarks.comm $(ARGS)

bench-map: bench-tools ## cost of a task next to other pools in the same guest: data and pictures (9 minutes on 2 cores); ARGS=--quick, ARGS=--draw
	@$(BIN)/sf image build bench $(BENCH_IMAGE)
	@$(BIN)/python -m benchmarks.map $(ARGS)

clean: ## remove what was built here (images and templates: `sf clean --all`)
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@$(MAKE) --silent --no-print-directory -C sfparallel/vmm/native clean
	@$(MAKE) --silent --no-print-directory -C sfparallel/runtime/agent clean
	@$(MAKE) --silent --no-print-directory -C sfparallel/runtime/cpu_check clean
