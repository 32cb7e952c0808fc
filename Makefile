# Every target sets up .venv first; where it is up to date that takes no time.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench

python := .venv/bin/python

# Where Python may not keep what it compiled, every process of a run compiles all of vLLM again: twice the time to start.
unexport PYTHONDONTWRITEBYTECODE

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' Makefile

setup: ## build or complete .venv
	@sh .ci/setup.sh

demo: setup ## train the tiny policy: r1 run r1-tiny (ARGS='name=mine seed=1' overrides)
	.venv/bin/r1 run r1-tiny $(ARGS)

# Unit tests mostly wait for processes: two at a time. What starts engines has the machine to itself. Status 5: ARGS
# picked none of these.
test: lint ## ruff, pyright and all CPU tests (ARGS='-k loss' picks)
	$(python) -m pytest tests/unit -n 2 --dist loadfile $(ARGS) || [ $$? -eq 5 ]
	$(python) -m pytest tests/integration tests/gpu $(ARGS) || [ $$? -eq 5 ]

lint: setup ## ruff and pyright
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright

bench: setup ## measure against TRL, bare vLLM and transformers
	$(python) -m benchmarks $(ARGS)
