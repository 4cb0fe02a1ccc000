# make demo   make the environment and run the three stages on embedded data, into ./demo
# make test   make the environment if needed and run the tests, about seven minutes on two cores
# make test-all  make test, then the slow tests: building a wheel, linting a clone
# make lint   ruff and mypy
# make bench  speed and memory, as JSON
# make soak   the long-running tests: random kills, full disks, flipped bits
#
# PYTHON=python3.12 picks the interpreter, VENV=DIR another place for the environment,
# ARGS="-k store" goes to pytest.

PYTHON ?= python3
VENV = .venv
DEMO = ./demo
ARGS =
BIN = $(VENV)/bin

.PHONY: help install demo test test-all lint types bench soak

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: install
	@"$(BIN)/compress" demo --out "$(DEMO)"

test: install
	@"$(BIN)/python" -m pytest -n auto --dist loadfile $(ARGS)

test-all: test
	@"$(BIN)/python" -m pytest -m extended $(ARGS)

# mypy cannot see an editable install with package-dir, so it gets a link to this folder that has the package's name.
lint: install
	@"$(BIN)/python" -m ruff check .
	@$(MAKE) --no-print-directory types

types:
	@root="$$(mktemp -d)"; trap 'rm -rf "$$root"' EXIT; ln -s "$(CURDIR)" "$$root/compress_ssl"; cd "$$root" && \
	    MYPYPATH="$$root:$(CURDIR)" "$(abspath $(BIN))/python" -m mypy --config-file "$(CURDIR)/pyproject.toml" \
	    --cache-dir "$(CURDIR)/.mypy_cache" \
	    -p compress_ssl.pipeline -p compress_ssl.stages -m compress_ssl -m compress_ssl.cli -m compress_ssl.__main__ -p benchmarks

bench: install
	@"$(BIN)/python" -m benchmarks

soak: install
	@"$(BIN)/python" -m pytest -m soak $(ARGS)

# The stamp holds a checksum of the pins and of this folder's path, not a time: a fresh clone, a
# touch or a switched branch reinstalls only if the content differs. It is written last, so that an
# interrupted install is resumed.
install:
	@stamp="$(VENV)/.installed"; \
	key=$$(pwd | cat - pyproject.toml constraints.txt | cksum); \
	works() { "$(BIN)/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
	if [ "$$key" = "$$(cat "$$stamp" 2>/dev/null)" ] && works; then exit 0; fi; \
	if ! works; then \
	    command -v "$(PYTHON)" >/dev/null || { \
	        echo "error: there is no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 2; }; \
	    "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	        echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3" >&2; exit 2; }; \
	    "$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	        echo "error: $(PYTHON) lacks its venv module; install it (on Debian and Ubuntu: the package python3-venv)" >&2; exit 2; }; \
	    clear=; if [ -f "$(VENV)/pyvenv.cfg" ]; then clear=--clear; fi; \
	    "$(PYTHON)" -m venv $$clear "$(VENV)" || exit 1; \
	fi; \
	rm -f "$$stamp"; \
	echo "installing into $(VENV): the first time takes minutes and about 8 GB" >&2; \
	"$(BIN)/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]' || exit 1; \
	printf '%s\n' "$$key" > "$$stamp"
