# make demo   the main job: continue pre-training SmolLM2-135M on this machine's Python documentation
# make demo-sft   tune it on questions and answers made from that documentation
# make demo-grpo  let it learn sums from rewards of its own answers
# make demo-neva  give it eyes: it reads characters in fonts that it has not seen
# make test   the tests; make test-all: those too that take minutes each (a real SLURM, killed runs and pods)
# All set up .venv first, once; `make setup` does only that.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed-$(shell cat requirements/*.txt | cksum | cut -d' ' -f1)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q

.PHONY: setup demo demo-sft demo-grpo demo-neva test test-all lint clean

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

demo-sft: setup
	$(VENV)/bin/python launchers/run.py recipe=sft_llama3 gpus=2 steps=16 lr=1e-4 export=hf out=runs/demo-sft

demo-grpo: setup
	$(VENV)/bin/python launchers/run.py recipe=grpo_llama3 out=runs/demo-grpo

demo-neva: setup
	$(VENV)/bin/python launchers/run.py recipe=neva_llama3 gpus=2 out=runs/demo-neva

PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) -m "not slow"

test-all: setup
	$(PYTEST)

lint: setup
	$(VENV)/bin/python -m ruff check . && $(VENV)/bin/python -m ruff format --check .

clean:
	rm -rf $(VENV)
