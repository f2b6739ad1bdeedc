# The words of this project. `make demo` and `make test` do all their set-up themselves, in .venv.
#
#   ARGS      more arguments for fl demo or pytest:  make demo ARGS="--devices 20 --json run.json"
#             with and without a worker, a minute:   make demo ARGS=--hybrid
#             silos, each rule in turn, a minute:    make demo ARGS=--silo
#   TORCH=1   train with torch:                      make demo TORCH=1
#   PYTHON    interpreter to make .venv with:        make demo PYTHON=python3.12

BIN := .venv/bin
INSTALL := @requirements/install.sh
TESTERS ?= 4

.PHONY: help demo test lab lab-full soak fuzz lint bench wheel ansible sample lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16
	@sed -n 's/^#   /  /p' $(firstword $(MAKEFILE_LIST))

demo: ## a federation of eleven processes learns to read handwriting in 15 s
	$(INSTALL) demo.lock $(if $(TORCH),torch.txt)
	@$(BIN)/python -m fedctl demo $(if $(TORCH),--torch) $(ARGS)

test: ## all tests
	$(INSTALL) dev.lock torch.txt
	@$(BIN)/python -m pytest -n $(TESTERS) --dist load --maxschedchunk 1 $(ARGS)

lab: wheel ## a cluster on real systemd hosts of this machine: root only, 15 minutes
	$(INSTALL) dev.lock ansible.lock
	@FEDCORE_PLAYBOOKS=1 $(BIN)/python -m pytest -q tests/integration/test_playbook_pki.py
	@tests/lab/run --minutes 30 -m "not full" $(ARGS)

lab-full: wheel ## the same with every fault: an hour or two
	@tests/lab/run --minutes 180 $(ARGS)

soak: ## the crash and replay tests for longer:  make soak SECONDS=3600
	$(INSTALL) dev.lock torch.txt
	@FEDCORE_SOAK=$(or $(SECONDS),300) $(BIN)/python -m pytest -s tests/integration/test_crashes.py $(ARGS)
	@FEDCORE_SOAK=$(or $(SECONDS),300) $(BIN)/python -m pytest -s tests/integration/test_random_faults.py tests/model/test_iteration_model.py $(ARGS)
	@FEDCORE_SOAK=10 $(BIN)/python -m pytest tests/unit/ledger tests/model/test_ledger_model.py -n $(TESTERS) $(ARGS)

fuzz: ## ten million damaged inputs in process, 200,000 over sockets: ten minutes
	$(INSTALL) dev.lock torch.txt
	@PYTHONPATH=tests $(BIN)/python -W ignore -m fuzz --inputs $(or $(INPUTS),10000000) --processes 2 $(ARGS)
	@PYTHONPATH=tests $(BIN)/python -m fuzz.sockets --inputs 200000

lint: ## style, format, types, direction of imports, units, playbooks
	$(INSTALL) dev.lock torch.txt ansible.lock
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@systemd/verify
	@cd ansible && PATH=$(CURDIR)/$(BIN):$$PATH yamllint --strict . && PATH=$(CURDIR)/$(BIN):$$PATH ansible-lint --offline --strict -q

bench: ## the measurements of docs/PERFORMANCE.md that need no second machine
	$(INSTALL) dev.lock
	@for file in bench/*.py; do $(BIN)/python $$file $(ARGS) || exit; done

wheel: ## the package that playbooks install, in dist/; for hosts of another kind of machine:  FEDCORE_PURE=1 make wheel
	$(INSTALL) run.lock
	@rm -rf build dist/fedcore-*.whl
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct 2>/dev/null || echo 1700000000) $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

ansible: ## .venv with Ansible, to run the playbooks with
	$(INSTALL) run.lock ansible.lock

sample: ## etc/fl.yaml.sample anew from the code
	$(INSTALL) dev.lock torch.txt
	@$(BIN)/python -c "from fedcore.config.sample import render_sample as r; print(r(), end='')" > etc/fl.yaml.sample

lock: ## choose the versions anew that demo and test install:  make lock ARGS=--upgrade
	$(INSTALL) dev.lock
	@requirements/lock.sh $(ARGS)

clean: ## remove all that make has made
	rm -rf .venv build dist demo-run lib/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find lib -name '*.so' -delete
