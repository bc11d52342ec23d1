# Every target sets up what it needs: a machine with Python 3.11 or newer and make is enough.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check

# What `make generate` takes; the service chooses what is left empty.
PROMPT ?= a small red circle moving right on a black background
MODE   ?=
SIZE   ?=
FRAMES ?=
STEPS  ?=
SEED   ?=
GUIDANCE ?=
NEGATIVE ?=
OUT    ?= out.mp4
# What `make demo` takes, besides the variables of docs/operations.md#environment.
PORT   ?=
# How many processes run the tests of `make test`.
PROCESSES ?= 3
# What `make test` needs.
TESTED := $(addprefix $(VENV)/.,dev openai-2.8.0 npu-2.13 triton-ascend-3.2 chromium npm redis)
# Where `make screenshots` and `make film` leave their pictures.
FOLDER ?= var/screenshots
FILM   ?= var/comparison.mp4
# What `make images` builds: service, cpu, cuda, npu.
IMAGES ?= service cpu
# Where `make sbom` leaves the bills of materials.
SBOM   ?= var/sbom

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo generate test test-all test-npu test-ray check-deploy lint fuzz fix bench check-wheel screenshots film
.PHONY: images sbom locks fetched

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

install: $(VENV)/.dev ## install everything, development tools included

demo: export DEMO_PORT := $(value PORT)
demo: $(VENV)/.demo ## run the whole system here until Ctrl-C  [PORT=8000, SERVICE_…=, WORKER_…=]
	@$(BIN)/python -m deploy.local demo

# A text may hold quotes, dollar signs and anything else: it travels unexpanded, through the
# environment, and no shell and no make ever reads it as code.
generate: export GENERATE_PROMPT := $(value PROMPT)
generate: export GENERATE_MODE := $(value MODE)
generate: export GENERATE_SIZE := $(value SIZE)
generate: export GENERATE_FRAMES := $(value FRAMES)
generate: export GENERATE_STEPS := $(value STEPS)
generate: export GENERATE_SEED := $(value SEED)
generate: export GENERATE_GUIDANCE := $(value GUIDANCE)
generate: export GENERATE_NEGATIVE := $(value NEGATIVE)
generate: export GENERATE_OUT := $(value OUT)
unexport PROMPT MODE SIZE FRAMES STEPS SEED GUIDANCE NEGATIVE OUT PORT
generate: $(VENV)/.demo ## prompt to MP4  [PROMPT= MODE= SIZE= FRAMES= STEPS= SEED= GUIDANCE= NEGATIVE= OUT=]
	@$(BIN)/python -m deploy.local generate

# Each process runs whole files, in the order of their names: by number of tests, a file with one long test would be last.
# Most tests wait more than they compute, so there are more processes than cores. What is slow would be disturbed by the
# others: it runs first, in two processes, as each kills and restarts its own. These import only the files with such tests.
test: $(TESTED) ## tests that need no accelerator, without the slow ones  [ARGS= PROCESSES=]
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(TESTED) ## the slow ones first (faults of every process, fuzzing), then those of make test
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not cuda and not npu and not weights" \
	    $$(grep -rl --include='*.py' 'mark\.slow' tests)
	@$(MAKE) --no-print-directory test

test-npu: $(VENV)/.dev $(VENV)/.npu-2.13 $(VENV)/.triton-ascend-3.2 ## whole jobs on a simulated Ascend card, and every torch_npu call; part of make test  [ARGS=]
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -s tests/npu $(ARGS)

# Apart from make test: Ray is 79 MB, and its two clusters start and stop slowly.
test-ray: $(VENV)/.dev $(VENV)/.ray-2.60 ## workers on a Ray cluster of this machine  [ARGS=]
	@OMP_WAIT_POLICY=passive PYTHONPATH="$(abspath $(VENV))/ray-2.60" $(BIN)/python -m pytest -s -m ray tests/deploy/ray $(ARGS)

check-deploy: $(VENV)/.dev $(VENV)/.deploy-checks ## images, compose, Kubernetes, systemd, proxies, alerts and dashboard, by their own tools  [ARGS=]
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m deploy tests/deploy/manifests/tools $(ARGS)

# For .ci/run, which fetches while it checks.
fetched: $(TESTED)

lint: $(VENV)/.dev $(VENV)/.npm ## ruff, mypy, import contracts, types of the pages' scripts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/node $(VENV)/npm/node_modules/typescript/bin/tsc -p service/pages

fuzz: $(VENV)/.dev ## eight minutes of requests made from the OpenAPI document, against a real service
	@FUZZ_SECONDS=480 $(BIN)/python -m pytest -s -m slow tests/e2e/test_contract.py

fix: $(VENV)/.dev ## let ruff repair and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.demo ## seconds per stage of a job, bf16 beside w8a8
	@$(BIN)/python -m benchmarks.serving.job_latency

check-wheel: $(VENV)/.dev ## build the wheel, install it into an empty environment, make a video there
	@$(BIN)/python -m tests.deploy.wheel_install

screenshots: $(VENV)/.dev $(VENV)/.chromium ## every page and state in light and dark, on a desktop and a phone  [FOLDER=]
	@$(BIN)/python -m tests.pages.pictures.screenshots "$(FOLDER)"

film: $(VENV)/.dev $(VENV)/.chromium ## a minute of a comparison at work  [FILM=]
	@$(BIN)/python -m tests.pages.pictures.film "$(FILM)"

images: ## container images with docker, podman or buildah  [IMAGES="service cpu" ENGINE= OPTIONS= TAG=]
	@sh docker/build.sh $(IMAGES)

sbom: $(VENV)/.deploy-checks ## what pip installs into the images, CycloneDX; no base, no torch and torch_npu of the CPU's and NPU's  [SBOM=]
	@mkdir -p "$(SBOM)"
	@for name in service worker worker-without-torch tracing; do \
	    PYTHONWARNINGS=ignore $(VENV)/deploy-checks/bin/cyclonedx-py requirements "requirements/$$name.txt" --pyproject pyproject.toml \
	        --output-reproducible -o "$(SBOM)/$$name.cdx.json" || exit 1; \
	    echo "$(SBOM)/$$name.cdx.json"; \
	done

locks: $(VENV)/.deploy-checks ## write the files with hashes in requirements/ from constraints.txt
	@sh deploy/install/locks.sh "$(abspath $(VENV))/deploy-checks/bin/uv"

$(VENV)/.venv:
	@sh deploy/install/venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "installing what the service and the worker need (some minutes, once)"
	@$(PIP) -e '.[worker,demo]' -c constraints.txt
	@touch $@

# pip compiles 350 MB of Python on one core. A few files of others have errors of syntax, which nobody imports.
$(VENV)/.dev: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "installing everything, development tools included (some minutes, once)"
	@sh deploy/install/compiler.sh "$(VENV)"
	@$(PIP) --no-compile -e '.[dev]' -c constraints.txt
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib/python3*/site-packages || true
	@touch $(VENV)/.demo $@

$(VENV)/.deploy-checks: requirements/deploy-checks.txt deploy/install/deploy_checks.sh | $(VENV)/.venv
	@echo "fetching what checks images and manifests (once)"
	@sh deploy/install/deploy_checks.sh "$(VENV)"

$(VENV)/.chromium: | $(VENV)/.venv
	@sh deploy/install/chromium.sh
	@touch $@

$(VENV)/.npm: requirements/npm/package.json requirements/npm/package-lock.json deploy/install/npm.sh | $(VENV)/.dev
	@sh deploy/install/npm.sh "$(VENV)"
	@touch $@

$(VENV)/.redis: deploy/install/redis.sh | $(VENV)/.venv
	@sh deploy/install/redis.sh "$(VENV)"
	@touch $@

# An older client of OpenAI's, beside the current one that .dev brings: the two send requests differently.
# What it needs besides distro is there already.
$(VENV)/.openai-2.8.0: | $(VENV)/.dev
	@rm -rf "$(VENV)/openai-2.8.0"
	@$(PIP) --quiet --no-deps --target "$(VENV)/openai-2.8.0" openai==2.8.0 distro==1.9.0
	@touch $@

# torch_npu, for processes of their own: in this environment everything that imports torch would load it.
# Without a wheel there is no stamp, and `make test` goes on without these tests.
$(VENV)/.npu-2.13: deploy/install/torch_npu.sh | $(VENV)/.dev
	@sh deploy/install/torch_npu.sh "$(VENV)"

# The compiler of Triton's kernels for Ascend 910B, for processes of its own: it takes Triton's place.
# Without a wheel there is no stamp, and `make test` goes on without these tests.
$(VENV)/.triton-ascend-3.2: deploy/install/triton_ascend.sh | $(VENV)/.dev
	@sh deploy/install/triton_ascend.sh "$(VENV)"

# Ray, for processes of their own: nothing else needs it.
$(VENV)/.ray-2.60: deploy/install/ray.sh constraints.txt | $(VENV)/.dev
	@sh deploy/install/ray.sh "$(VENV)"
	@touch $@
