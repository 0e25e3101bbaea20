# `make demo` and `make test` need Python 3.11+, make and a C compiler; they build .venv first.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/bootpig/toyworld.yaml
MODEL ?= toyworld
ARGS ?=
GENERATED := runs/datagen/toyworld_training

.DEFAULT_GOAL := help
.PHONY: help demo demo-generated test test-slow lint types datagen train eval app test-app sweep dreambooth dreamblend \
	tournament claims bench-datagen bench-training bench-sampling toyworld-weights clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

demo: .venv/.ready ## triplets -> training -> images of unseen subjects -> scores, on the toy world, into runs/demo
	$(BIN)/python -m pig.demo

demo-generated: .venv/.ready ## the same, trained on triplets that the toy models generate; both tables side by side
	$(BIN)/python -m data_gen configs/datagen/toyworld.yaml output=$(GENERATED) captions.count=135 images.per_caption=20 \
		shards.size=135
	$(BIN)/python -m pig.demo --out runs/demo-generated --triplets $(GENERATED) --beside runs/demo

# A test that hangs for 300 seconds fails; slow ones may take longer.
test: lint types ## lint, types and tests, under 10 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
		-o faulthandler_timeout=300 -o faulthandler_exit_on_timeout=true

test-slow: .venv/.ready ## the tests that take most of a minute each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: .venv/.ready ## ruff: rules and format
	$(BIN)/ruff check pig data_gen tests benchmarks
	$(BIN)/ruff format --check pig data_gen tests benchmarks

types: .venv/.ready ## mypy on pig/ and data_gen/
	$(BIN)/mypy

datagen: .venv/.ready ## up to 256 synthetic triplets by the toy models: captions -> images -> masks -> filters -> shards
	$(BIN)/python -m data_gen configs/datagen/toyworld.yaml $(ARGS)

train: .venv/.ready ## python -m pig.cli fit --config $(CONFIG) $(ARGS); after the demo, on its data, or on yours
	$(BIN)/python -m pig.cli fit --config $(CONFIG) $(ARGS)

eval: .venv/.ready ## draw the toy benchmark (MODEL=DIR: by a model of yours), score it, make runs/eval/report.html
	$(BIN)/python -m data_gen subjects --out runs/eval/subjects --count 12
	$(BIN)/python -W ignore -m pig.cli generate --subjects runs/eval/subjects --out runs/eval/images_$(notdir $(MODEL)) \
		--model $(MODEL) --images_per_prompt 2 --steps 12
	$(BIN)/python -W ignore -m pig.cli generate --subjects runs/eval/subjects --out runs/eval/text_only \
		--model base:toyworld --text_guidance 3 --images_per_prompt 2 --steps 12
	$(BIN)/python -W ignore -m pig.cli evaluate --config configs/evaluation/toyworld.yaml --out runs/eval \
		--images runs/eval/images_$(notdir $(MODEL)) --text_only runs/eval/text_only --subjects runs/eval/subjects

app: .venv/.app ## a page to draw on in the browser, at localhost:7860 (ARGS="--model DIR")
	$(BIN)/python -W ignore -m pig.cli app $(ARGS)

test-app: .venv/.browser ## the page driven in Chromium (apt-get install chromium)
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m pytest -m browser tests/commands/test_app.py

sweep: .venv/.ready ## what each setting of the sampling does to the scores: 50 subjects x 3 seeds, into runs/sweep (hours)
	$(BIN)/python -W ignore -m benchmarks.sweep $(ARGS)

dreambooth: .venv/.ready ## DreamBooth, LoRA, Textual Inversion by steps of tuning, on the toy world, into runs/dreambooth_steps (hours; resumable)
	$(BIN)/python -W ignore -m benchmarks.dreambooth $(ARGS)

dreamblend: .venv/.ready ## DreamBlend against DreamBooth's own checkpoints, on the toy world, into runs/dreamblend (hours; resumable)
	$(BIN)/python -W ignore -m benchmarks.dreamblend $(ARGS)

tournament: .venv/.ready ## all methods on one base, data set and benchmark, into runs/tournament (hours; resumable)
	$(BIN)/python -W ignore -m pig.cli tournament configs/tournament/toyworld.yaml $(ARGS)

claims: .venv/.ready ## what the papers say, tested on the toy world, into runs/claims (hours; resumable)
	for file in configs/claims/*.yaml; do $(BIN)/python -W ignore -m pig.cli tournament $$file $(ARGS) || exit 1; done

bench-datagen: .venv/.ready ## samples/s and peak memory of each stage of data generation, into runs/bench
	$(BIN)/python -W ignore -m benchmarks.datagen

bench-training: .venv/.ready ## what a training sample costs, naive and ours, and what the loader gives, into runs/bench
	$(BIN)/python -W ignore -m benchmarks.training
	$(BIN)/python -W ignore -m benchmarks.loader

bench-sampling: .venv/.ready ## what an image costs, naive, ours and plain: seconds, FLOPs, memory, into runs/bench
	$(BIN)/python -W ignore -m benchmarks.sampling
	$(BIN)/python -W ignore -m benchmarks.ezigen

toyworld-weights: .venv/.ready ## train the embedded models again from nothing (many hours; resumable)
	for stage in vae clip vision dino sam unet; do $(BIN)/python -m pig.toyworld.pretrain $$stage || exit 1; done
	$(BIN)/python -m data_gen triplets --out runs/toyworld/data/triplets --count 8000
	$(BIN)/python -m data_gen triplets --out runs/toyworld/data/val --count 64 --first_seed 1100000000
	$(BIN)/python -m data_gen subjects --out runs/toyworld/data/subjects
	for method in bootpig ezigen instantbooth ip_adapter; do \
		run=runs/toyworld/$$method; last=$$run/fit/checkpoints/last.ckpt; mkdir -p $$run && ln -sfn ../data $$run/data; \
		$(BIN)/python -m pig.cli fit --config configs/$$method/toyworld.yaml --run $$run --trainer.limit_val_batches 0 \
			--trainer.max_steps 200 \
			$$([ -f $$last ] && echo --ckpt_path $$last) && \
		$(BIN)/python -m pig.cli export --checkpoint $$last --delta --half --out pig/toyworld/weights/$$method || exit 1; \
	done
	rm -r pig/toyworld/weights/ip_adapter/image_encoder pig/toyworld/weights/*/README.md # it is weights/clip; no cards

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache *.egg-info

# uv resolves torch and torchvision as a matching pair from one index. Byte code: where Python may write none of its own
# (PYTHONDONTWRITEBYTECODE, read-only folders), each start would take twice as long.
.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pig needs Python 3.11 or later; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[dev]'
	touch $@

.venv/.app .venv/.browser: .venv/.%: .venv/.ready
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable '.[$*]'
	touch $@
