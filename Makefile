# Everything runs in a private environment, .venv, made on the first call of any target.
PYTHON ?= python3.11
ifeq ($(origin STUDIES),undefined)
# A newcomer without images gets CT phantoms, written to ./studies.
STUDIES := studies
SAMPLES := --samples
endif
HOST ?= 127.0.0.1
PORT ?= 8000
BIN := .venv/bin

.PHONY: serve test test-all test-browser lint format docker-check setup clean

serve: setup
	$(BIN)/samloop serve --studies "$(STUDIES)" $(SAMPLES) --host $(HOST) --port $(PORT) $(ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest $(ARGS)

test-all: .venv/.dev
	$(BIN)/python -m pytest -m "not gpu and not browser" $(ARGS)

# OHIF in Chromium, from the study list to a retrained model; needs Chromium and Orthanc.
test-browser: .venv/.dev
	$(BIN)/python -m pytest -m browser $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every step of docker/Dockerfile and what the image runs, without Docker; needs root, debootstrap and 20 GB.
DOCKER_WORK ?= /var/tmp/samloop-docker-check
docker-check: .venv/.dev
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/python -m tests.dockersteps --work $(DOCKER_WORK) $(ARGS)

setup: .venv/.run

.venv/.run: requirements.txt pyproject.toml
	sh install.sh "$(PYTHON)" .venv -e .
	touch $@

RUNTIMES := requirements-onnx.txt requirements-openvino.txt

.venv/.dev: .venv/.run requirements-dev.txt $(RUNTIMES)
	sh install.sh "$(PYTHON)" .venv -r requirements-dev.txt $(RUNTIMES:%=-r %)
	touch $@

clean:
	rm -rf .venv build *.egg-info
