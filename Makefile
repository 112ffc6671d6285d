# Two commands: `make demo` and `make test`. Both make .venv first if it is missing.
PYTHON ?= python3
BIN = .venv/bin
RUN = runs/tiny

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/ouro train --config=configs/tiny.py --workdir=$(RUN)
	$(BIN)/ouro train --config=configs/tiny.py:fork --workdir=$(RUN)_fork --config.init_from=$(RUN)/stable_1a
	$(BIN)/ouro generate --checkpoint=$(RUN) --prompt="def main(" --max_new_tokens=48 --exit=q:0.5
	$(BIN)/ouro report --workdir=$(RUN)

test: .venv/installed
	$(BIN)/python -m pytest -n 2 tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e ".[clean,data,dev,eval,quantize,serve,study,tpu]"
	touch $@

clean:
	rm -rf .venv data/tiny data/tiny_smoke
