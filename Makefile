# Every target works as the first command in a fresh clone: it installs what it needs, once.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?=
# no: without SmolLM2, for which make rehearse then builds a tiny random model
REAL_MODEL ?= yes
RUN = VENV=.venv; source ./env.sh &&

.PHONY: help install install-v100 rehearse reference test submission clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

install-v100: .venv-v100/.installed  ## create .venv-v100, the environment for Volta GPUs

install:  ## create .venv from requirements.txt, or .venv-v100 if this machine's GPUs need it
	@VENV=; source ./env.sh && if why=$$(needs_v100); then \
	    echo "GPU with $$why: .venv-v100 is what training needs here"; $(MAKE) -s .venv-v100/.installed; \
	else $(MAKE) -s .venv/.installed; fi

# Every file that preflight compares with the installed ones; the list, because one that goes leaves nothing newer.
PLUGINS := $(sort $(wildcard sglang/runtime_plugins/*.py)) sglang/runtime_plugins/pyproject.toml
ifneq ($(PLUGINS),$(shell cat .venv/.plugins 2>/dev/null))
.venv/.installed: other-plugins
.PHONY: other-plugins
endif

.venv/.installed: requirements.txt $(PLUGINS)
	@VENV=; source ./env.sh && install_environment .venv requirements.txt "$(PYTHON)" ./sglang/runtime_plugins
	@echo $(PLUGINS) > .venv/.plugins
	@[ "$(REAL_MODEL)" = no ] || { $(RUN) python rehearsal/smollm2.py; }

.venv-v100/.installed: deepspeed/requirements-v100.txt
	@VENV=; source ./env.sh && install_environment .venv-v100 deepspeed/requirements-v100.txt "$(PYTHON)"

# Generation serves the adapter that fine-tuning has just trained.
rehearse: .venv/.installed  ## both jobs on the CPU: small model, shipped data, same code paths
	@$(RUN) runs=rehearsal/runs/$$(date +%Y%m%d-%H%M%S); \
	bash deepspeed/run_llama2_7b_lora.sh --rehearse --output_dir $$runs/finetune && \
	python sglang/run_sglang.py --rehearse --lora_path $$runs/finetune --output_file $$runs/inference/outputs.jsonl

test: .venv/.installed  ## every claim once, on real DeepSpeed and SGLang, without a GPU or the hub
	@$(RUN) python -P -m pytest -m 'not long' -n 2 --dist loadfile --no-loadscope-reorder

reference: .venv/.installed  ## does this machine compute what the committed rehearsal did?
	@$(RUN) python handout/reference.py

submission: .venv/.installed  ## build/submission.zip: the files to hand in (REHEARSAL=rehearsal/runs/...: of that run)
	@$(RUN) trained=$${REHEARSAL:+$$REHEARSAL/finetune}; trained=$${trained:-deepspeed/output_llama2_7b_lora}; \
	answered=$${REHEARSAL:+$$REHEARSAL/inference}; answered=$${answered:-sglang}; \
	rm -rf build/submission; mkdir -p build/submission/{finetune,inference}; found=0 missing=0; \
	pack() { if [ -f "$$1" ]; then cp "$$1" "build/submission/$$2"; found=1; else echo "missing: $$1" >&2; missing=1; fi; }; \
	for name in adapter_model.safetensors adapter_config.json metrics.jsonl run_config.json summary.json; do \
	    pack "$$trained/$$name" finetune; done; \
	for name in outputs.jsonl outputs_all.json summary.json; do pack "$$answered/$$name" inference; done; \
	[ $$found = 1 ] || { echo "error: nothing to pack; run both jobs, or name a rehearsal: REHEARSAL=rehearsal/runs/..." >&2; exit 2; }; \
	cd build/submission; python -m zipfile -c ../submission.zip finetune inference; \
	if [ $$missing = 1 ]; then echo "build/submission.zip holds the rest only" >&2; exit 1; fi; echo build/submission.zip

clean:  ## remove rehearsal runs and caches (not .venv, not your outputs)
	rm -rf build/handout build/handout.zip build/autograder.zip rehearsal/runs .pytest_cache .ruff_cache .hypothesis
	find deepspeed sglang rehearsal tests -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Staff only
.PHONY: test-all test-v100 test-cluster lint format lock handout grade autograder

KILLS ?= 100

test-all: .venv/.installed  ## the long versions too
	@$(RUN) python -P -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-v100: .venv-v100/.installed  ## parity and resume in the environment for Volta GPUs (torch 2.7.1)
	@VENV=.venv-v100; source ./env.sh && python -P -m pytest -m v100

test-cluster: .venv/.installed  ## break runs on a real Slurm of two nodes and resume them (needs root; KILLS=100, ONLY=NAMES)
	@$(RUN) python -P tests/cluster/campaign.py --kills $(KILLS) \
		$(if $(ONLY),--only $(ONLY),&& python -P -m pytest -s tests/cluster/inference.py)

lint: .venv/.installed  ## ruff and shellcheck
	@$(RUN) ruff check . && ruff format --check . && shellcheck -x env.sh deepspeed/*.sh deepspeed/job.sbatch sglang/job.sbatch tests/cluster/*.sh .ci/run handout/autograder/*

format: .venv/.installed  ## let ruff rewrite the Python files
	@$(RUN) ruff check --fix . && ruff format .

# The Volta lock: the packages of training in the main lock's versions, with torch 2.7.1 (cu126), the last
# easy wheel with sm_70 kernels, and what hangs on it (triton, nvidia-*) free to differ.
lock: .venv/.installed  ## resolve requirements.in into both locks
	@$(RUN) uv pip compile requirements.in -o requirements.txt --python-version 3.11 \
	    --no-annotate --no-header -q
	@$(RUN) grep -vE '^(torch|triton|nvidia-|cuda-|setuptools|sympy)' requirements.txt > .venv/constraints.txt
	@$(RUN) { echo torch==2.7.1; grep -vE '^(torch|liger-kernel|sglang|flashinfer-python|cuda-toolkit|jsonschema|interegular|pytest-xdist)\b' requirements.in; } \
	    | uv pip compile - -c .venv/constraints.txt -o deepspeed/requirements-v100.txt \
	    --python-version 3.11 --no-annotate --no-header -q

handout: .venv/.installed  ## build/handout/ and build/handout.zip, the students' version
	@$(RUN) python handout/make_handout.py

grade: .venv/.installed  ## points of SUBMISSION (a zip, a folder, or a folder of them), into build/grades/
	@$(RUN) python handout/grade.py --submission "$${SUBMISSION:-}"

autograder: .venv/.installed  ## build/autograder.zip for Gradescope and GitHub Classroom
	@$(RUN) python handout/make_autograder.py
# End of staff only
