# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
PY      = $(VENV)/bin/python
READY   = $(VENV)/.ready
METHODS ?= adpo,kd
ENV     ?= halfcheetah
SEEDS   ?= 0,1,2
SIZE    ?= claim
ARGS    ?=

# Small networks are 3 to 5 times faster on one thread; hardware.threads sets more for a run.
export OMP_NUM_THREADS = 1

.PHONY: help run test smoke sweep lint bench lock teacher clean setup
help:            ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## create .venv and install the locked dependencies
# torch is installed apart: its build differs by machine, so the lock holds no hash for it. An installed one is kept.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), "Python 3.11 to 3.13 is needed; set PYTHON="'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install --quiet torch==2.13.0
	$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

run: $(READY)    ## the headline: adpo distils HalfCheetah's teacher (ARGS="seed=1 …" changes it)
	$(PY) -m runner method=adpo env=halfcheetah $(ARGS)

test: $(READY)   ## lint and every test
	$(PY) -m ruff check .
	$(PY) -m pytest -n 2 --dist worksteal

smoke: $(READY)  ## every method at size=smoke, in one process
	$(PY) scripts/smoke.py

sweep: $(READY)  ## METHODS=adpo,kd ENV=halfcheetah SEEDS=0,1,2 SIZE=claim ARGS=…
	$(PY) -m runner -m method=$(METHODS) env=$(ENV) seed=$(SEEDS) size=$(SIZE) $(ARGS)

lint: $(READY)   ## ruff
	$(PY) -m ruff check .

bench: $(READY)  ## the benchmarks that need no other package (see scripts/bench)
	$(PY) scripts/bench/cli_cpu.py
	$(PY) scripts/bench/loop_overhead.py

lock:            ## write requirements.lock anew (needs uv)
	$(PYTHON) scripts/lock.py

teacher: $(READY) ## train HalfCheetah's teacher again and put it in the tree (about 40 minutes of one core)
	$(PY) scripts/teacher.py

clean:           ## remove what was built; runs/ stays
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
