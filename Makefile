# Everything runs in .venv, which the first target makes.

PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$python && break; done)
VENV := .venv
READY := $(VENV)/.ready
# The virtual environment's ninja must be found when DeepSpeed compiles its CPU collectives.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# One process a GPU, as many of them as the batch of 64 divides by; two on a machine without.
NUM_GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU')
NUM_PROCESSES ?= $(if $(filter 0,$(NUM_GPUS)),2,$(shell for n in 64 32 16 8 4 2 1; do \
	test $$n -le $(NUM_GPUS) && echo $$n && break; done))
# Said here, it keeps DeepSpeed from warning that it looked for a GPU in vain.
$(if $(filter 0,$(NUM_GPUS)),$(eval export DS_ACCELERATOR := cpu))

CORPUS ?= corpus
NUM_TRAIN_CLIPS ?= 1536
NUM_TEST_CLIPS ?= 256
RUN ?= runs/soundscape-audio-text

.PHONY: pretrain test test-faults bench lint type format clean

pretrain: $(READY)  ## the main job on the embedded corpus: generate, pack, train, evaluate
	python -m shards.build soundscape split=train num_clips=$(NUM_TRAIN_CLIPS) media=$(CORPUS)/media-train out=$(CORPUS)/train \
		sample_rate_hz=16000 frame_short_side_pixels=64
	python -m shards.build soundscape split=test num_clips=$(NUM_TEST_CLIPS) media=$(CORPUS)/media-test out=$(CORPUS)/test \
		sample_rate_hz=16000 frame_short_side_pixels=64
	rm -rf $(RUN)
	deepspeed --log_level warning --num_accelerators $(NUM_PROCESSES) launch/pretrain.py recipe=launch/recipes/soundscape/audio_text.yaml \
		run_dir=$(RUN) data.train.soundscape.shards=$(CORPUS)/train data.validation.soundscape.shards=$(CORPUS)/test \
		data.validation.soundscape.relevance=$(CORPUS)/media-test/relevance.jsonl

test: $(READY)  ## the test suite, in two processes that share what is left
	python -m pytest -n 2 --dist worksteal

bench: $(READY)  ## what a shard build, the reader and the loss cost: CPU time, memory; some 40 minutes
	OMP_NUM_THREADS=1 python -m tests.bench.bench_build docs/build_memory.png
	OMP_NUM_THREADS=1 python -m tests.bench.bench_reader
	OMP_NUM_THREADS=1 python -m tests.bench.bench_losses

test-faults: $(READY)  ## builds and runs that are killed, stopped, signalled or (as root) cut off: tens of minutes
	python -m pytest -m faults -s

lint: $(READY)  ## ruff, and the import contract of the floors
	ruff check .
	ruff format --check .
	lint-imports

type: $(READY)  ## mypy, strict
	mypy

format: $(READY)
	ruff format .
	ruff check --fix .

$(READY): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed: install one, or name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
