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

test: lint ## ruff, pyright and all CPU tests (ARGS='-k loss' picks)
	$(python) -m pytest $(ARGS)

lint: setup ## ruff and pyright
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright

bench: setup ## measure against TRL, bare vLLM and transformers
	$(python) -m benchmarks $(ARGS)
