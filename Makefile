# Everything runs from the lock file in .venv; a fresh machine needs python3 (3.11+) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTOS := agent/v1/agent.proto deviceplugin/v1beta1/api.proto podresources/v1/api.proto
# Tests run against the built wheel, and from elsewhere: here `migplugin` would be this tree's.
TESTED := build/tested
PYTEST := cd $(TESTED) && MIGPLUGIN_TESTED=$(CURDIR)/$(TESTED) bin/python -m pytest --rootdir=../.. -c ../../pyproject.toml
LOCK := uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate

.PHONY: help setup demo test check manifests bench package image arm64 fmt protos locks lock-upgrade derived clean
.DEFAULT_GOAL := help

help: ## what each target does
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv from the lock file

$(STAMP): requirements-dev.lock pyproject.toml
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "migplugin needs Python 3.11 or newer, this is " + sys.version)'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --only-binary :all: -r requirements-dev.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: $(STAMP) ## the main job on a simulated node with two A100, told with measured times
	@$(BIN)/migplugin demo

test: $(STAMP) ## all tests, against the built wheel
	@.ci/tested
	$(PYTEST) ../../tests

check: $(STAMP) ## ruff, mypy, import layers, stubs, locks, settings table, schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/generated.py

manifests: $(STAMP) ## render and judge manifests and chart (fetches helm, kubectl and schemas into .tools)
	@.ci/tools
	@.ci/tested
	$(PYTEST) ../../tests/manifests ../../tests/e2e

bench: $(STAMP) ## measure beside a floor: JSON in bench-results/ and a table
	$(BIN)/python -m benchmarks

package: $(STAMP) ## sdist, wheel and SBOM in dist/, the wheel tried
	@.ci/package

image: $(STAMP) ## build the image for real and run it read-only (root, Debian)
	@.ci/image

arm64: $(STAMP) ## prove what can be without such a machine: wheels, and the agent under emulation (root, Debian)
	@.ci/arm64

fmt: $(STAMP) ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(STAMP) ## generate migplugin/_proto from protos/
	@rm -rf migplugin/_proto && mkdir migplugin/_proto
	@$(BIN)/python -m grpc_tools.protoc -Imigplugin/_proto=protos --python_out=. --grpc_python_out=. \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--mypy_out=quiet:. --mypy_grpc_out=quiet,async_only:. $(addprefix protos/,$(PROTOS))
	@find migplugin/_proto -type d -exec touch {}/__init__.py \;

locks: $(STAMP) ## resolve both lock files from pyproject.toml, keeping the versions they hold
	@$(BIN)/$(LOCK) --extra dev pyproject.toml -o requirements-dev.lock
	@$(BIN)/$(LOCK) --constraint requirements-dev.lock pyproject.toml -o requirements.lock

lock-upgrade: $(STAMP) ## resolve both lock files anew
	@$(BIN)/$(LOCK) --upgrade --extra dev pyproject.toml -o requirements-dev.lock
	@$(BIN)/$(LOCK) --upgrade --constraint requirements-dev.lock pyproject.toml -o requirements.lock

derived: $(STAMP) ## write README's settings table and docs/status.schema.json from migplugin/
	@$(BIN)/python .ci/generated.py --write

clean: ## remove what the other targets made
	rm -rf $(VENV) .tools build dist bench-results .mypy_cache .ruff_cache .pytest_cache .hypothesis
