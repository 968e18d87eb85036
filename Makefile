# make install: into .venv. make demo: install into .venv, make the embedded data set, train, test, make a report. make test: run the fast tests; make test-all: all of them.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := --dataset glyphs --backbone resnet_small --weights none --train_batch_norm --positives nn --lr 0.02 --overwrite

.PHONY: install demo test test-all lint clean

install: $(VENV)/.installed

demo: $(VENV)/.installed
	$(RUN) pre_process/pre_process_glyphs.py
	$(RUN) train.py $(DEMO) --n_epoch 0 --model_name demo_untrained
	$(RUN) train.py $(DEMO) --n_epoch 8 --model_name demo
	$(RUN) test.py --dataset glyphs --checkpoint_path new_checkpoint/demo_untrained/last.pth --json new_checkpoint/demo_untrained/test.json
	$(RUN) test.py --dataset glyphs --checkpoint_path new_checkpoint/demo/last.pth --json new_checkpoint/demo/test.json
	$(RUN) experiments/compare.py new_checkpoint/demo_untrained/test.json new_checkpoint/demo/test.json
	$(RUN) report.py new_checkpoint/demo --before new_checkpoint/demo_untrained

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -m "not slow"

test-all: $(VENV)/.installed-dev
	$(RUN) -m pytest

lint: $(VENV)/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
