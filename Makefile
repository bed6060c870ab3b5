# make demo   the main job: continue pre-training SmolLM2-135M on this machine's Python documentation
# make test   the tests
# Both set up .venv first, once; `make setup` does only that.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed-$(shell cat requirements/*.txt | cksum | cut -d' ' -f1)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q

.PHONY: setup demo test lint clean

setup: $(STAMP)

$(STAMP):
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in ((3, 11), (3, 12)))' \
	  || { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is another: make PYTHON=python3.12 setup"; exit 2; }
	@echo "setting up $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -r requirements/torch.txt -c requirements/lock.txt
	$(PIP) install --no-deps -r requirements/lock.txt -r requirements/unresolved.txt
	@touch $@

demo: setup
	$(VENV)/bin/python launchers/run.py recipe=cpt_llama3 nodes=1 gpus=2

test: setup
	$(VENV)/bin/python -m pytest

lint: setup
	$(VENV)/bin/python -m ruff check . && $(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf $(VENV)
