# make demo | test: each does all the set-up that it needs. The rest is for developers.

# PYTHON=... or an active environment (virtual, or conda's unless it is base) is used as it is; otherwise .venv is made.
PYTHON ?= $(or $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/python),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)/bin/python))
VENV := .venv
# -P keeps this folder off the path: its `kernels` would shadow Hugging Face's package of that name.
RUN := "$(or $(PYTHON),$(VENV)/bin/python)" -P -m
DEMO := demo
export TORCH_INDEX_URL

.PHONY: demo test test-all test-triton test-asan test-portability test-floor fuzz lint build fresh bench-peers clean setup

demo: setup
	$(RUN) ssd_core.data.smollm2 $(DEMO)/SmolLM2-135M-Instruct
	$(RUN) ssd_core.cli run --model $(DEMO)/SmolLM2-135M-Instruct --prompts demo --problems demo --preset demo \
		--out $(DEMO)/run --resume

# two at a time, whose waiting threads leave each other the cores
test: export OMP_WAIT_POLICY ?= PASSIVE
test: setup
	$(RUN) pytest -m "not all" -n 2

# every instruction set, every target of Triton's compiler, sanitizers, other compilers, packaging in environments of its
# own, killed and resumed runs
test-all: setup
	$(RUN) pip install --quiet ziglang
	$(RUN) pytest -m "all and not interpreted"

# all that the other backends are asked, of backend "triton" by both routes in Triton's interpreter
test-triton: setup
	$(RUN) pytest -m interpreted

# the part of it that AddressSanitizer and UndefinedBehaviorSanitizer watch, in build/sanitizers
test-asan: setup
	$(RUN) pytest -m all tests/test_sanitizers.py

# the part of it that compiles with another compiler and for another architecture
test-portability: setup
	$(RUN) pip install --quiet ziglang
	$(RUN) pytest -m all tests/test_portability.py

# new calls of backend cpu for so many seconds
fuzz: export FUZZ_SECONDS ?= 600
fuzz: setup
	$(RUN) pytest -m all tests/test_fuzz.py

# the oldest transformers and triton that are supported, in an environment of its own
test-floor:
	@sh .ci/setup "" .venv-floor
	.venv-floor/bin/python -P -m pip install --quiet "transformers==5.0.0" "triton==3.6.0" \
		"numpy<2.4"    # whose arrays of one element the interpreter of that triton takes for numbers
	.venv-floor/bin/python -P -m pytest -m "not all"

lint: setup
	$(RUN) ruff check .

setup:
	@sh .ci/setup "$(PYTHON)" $(VENV)

# the whole extension anew, for the torch that is installed now
build:
	rm -rf build/temp.* build/stamps/*.stamp
	@sh .ci/setup "$(PYTHON)" $(VENV)

# whom `bench` compares with: into the environment, or into build/peers where versions conflict
bench-peers: setup
	@sh .ci/peers "$(PYTHON)" $(VENV)

# the committed tree in an empty folder, as a stranger meets it; the folder stays if something fails
fresh:
	folder=$$(mktemp -d) && echo "$$folder" && git clone --quiet . "$$folder/ssd-core" && cd "$$folder/ssd-core" && \
		env -u VIRTUAL_ENV -u PYTHONPATH $(MAKE) PYTHON= demo && env -u VIRTUAL_ENV -u PYTHONPATH $(MAKE) PYTHON= test && \
		rm -rf "$$folder"

clean:
	rm -rf build dist $(VENV) .venv-floor *.egg-info ssd_core/_build.json ssd_core/*.so
