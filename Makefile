# `make demo` and `make test` need nothing but Python >= 3.10; both reuse .venv.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help demo test test-long check docs notebook zoo clean

define install
	if command -v uv >/dev/null 2>&1; then uv pip install --quiet --python $(BIN)/python -e ".[$(1)]"; \
	else $(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$(1)]"; fi
endef

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/ -/'

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(call install,dev)
	touch $@

demo: $(BIN)/.installed  ## erase the backdoor of a CIFAR-10 network without data (minutes)
	@echo "defense=auto on a network of zoo/: 2 to 15 minutes on a CPU; a table and the folder of the report follow"
	$(BIN)/python run.py victim=zoo victim.name=cifar10/airbench_half/badnets/0 defense=auto

test: $(BIN)/.installed  ## the tests of every behaviour (minutes)
	$(BIN)/python -m pytest -m "not long"

test-long: $(BIN)/.installed  ## the other tests: more sizes, networks and files, and the joblib launcher
	$(call install,joblib)
	$(BIN)/python -m pytest -m long

check: $(BIN)/.installed  ## format, lint, types and spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(BIN)/.installed  ## the site, into outputs/site; a warning is an error
	$(call install,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m dhbe.report --board docs/results/board --out outputs/site/results

notebook: $(BIN)/.installed  ## execute examples/compare_defenses.ipynb (5 minutes)
	$(call install,notebook)
	$(BIN)/python docs/notebook.py examples/compare_defenses.ipynb

START := data=cifar10 scale=cpu model=airbench_half attack=none defense=none paths.victims=outputs/zoo/victims

zoo: $(BIN)/.installed  ## train the victims that zoo/ lacks (hours; DHBE_DATA is where CIFAR-10 lies)
	$(BIN)/python run.py $(START) victim=airbench hydra.run.dir=outputs/zoo/start
	$(BIN)/python run.py $(START) victim=finetune victim.path=outputs/zoo/start/purified.safetensors hydra.run.dir=outputs/zoo/results/start \
		schedule@victim.schedule=muon_linear victim.schedule.epochs=4 victim.schedule.learning_rate=0.08 victim.schedule.batch_size=500
	$(BIN)/python -m dhbe.sweeping.publish outputs/zoo/results
	$(BIN)/python run.py -m +sweep=zoo
	$(BIN)/python -m dhbe.sweeping.publish outputs/zoo/results

clean:  ## delete environment and outputs
	rm -rf .venv outputs
