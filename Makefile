# Each target works from a bare checkout with Python 3.11 or newer and make: it creates .venv, installs into it, runs.
PYTHON    ?= python3
PROFILE   ?= quick
JOBS      ?= 2
DATASET   ?=
SCHEDULER ?=

BIN   := .venv/bin
READY := .venv/.installed

.PHONY: figures test lint unit notebooks book format lab lock clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

# PROFILE=quick (minutes) or paper (hours); DATASET=cifar10 for another data set; SCHEDULER=ADDRESS for a dask cluster.
figures: $(READY)  ## run notebooks/runs.yaml, only what changed
	$(BIN)/spear figures --profile $(PROFILE) --jobs $(JOBS) \
		$(if $(DATASET),--dataset $(DATASET)) $(if $(SCHEDULER),--scheduler $(SCHEDULER))

test: lint unit notebooks

lint: $(READY)
	@echo "== ruff: code and notebooks"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "== import-linter: each floor uses only those below, the attacker never sees the batch"
	$(BIN)/lint-imports

unit: $(READY)
	@echo "== pytest: laws, bad input, command line, notebook hygiene"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

notebooks: $(READY)
	@echo "== nbval: every notebook with small parameters"
	$(BIN)/python tests/prepare_notebooks.py build/nbval
	OMP_NUM_THREADS=1 SPEAR_FIGURES=$(CURDIR)/build/nbval/figures $(BIN)/python -m pytest -p no:python \
		-n $(JOBS) --dist loadscope --nbval-lax --nbval-current-env --nbval-cell-timeout 600 build/nbval

book: $(READY)  ## README, notebooks and figures as one static site
	$(BIN)/python -m sphinx -W -q -c book . build/book
	@echo "build/book/index.html"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lab: $(READY)
	$(BIN)/jupyter lab notebooks

# The tested versions, as they are in .venv: upgrade there (pip install -U NAME), run the tests, then lock.
lock: $(READY)
	$(BIN)/python -m pip freeze --exclude-editable --exclude spear | sed 's/+[a-z0-9.]*$$//' > constraints.tmp
	! grep ' @ ' constraints.tmp
	mv constraints.tmp constraints.txt

clean:
	rm -rf .venv build *.egg-info

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev,flower]' -c constraints.txt
	touch $@
