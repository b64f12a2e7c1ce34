# Two commands on a fresh machine: `make demo` boots the built-in guest, `make test` sets up and passes the tests.
# Both install what they need: packages by apt-get (as root, or with sudo), Python packages by pip into .venv.

SHELL := /bin/sh
VENV ?= .venv
PY := $(VENV)/bin/python
# the distribution's Python first: it starts 1.5 ms faster than most others
PYTHON ?= $(shell for p in /usr/bin/python3 python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { $$p -c 'import sys; print(sys.executable)'; break; }; done)
# docs/dependencies.md says what each is for.
SYSTEM_PACKAGES := gcc libc6-dev linux-libc-dev python3-venv
TEST_PACKAGES := linux-source make flex bison bc libelf-dev libssl-dev xz-utils lz4 cpio kmod busybox-static acpica-tools strace \
  e2fsprogs passt tcc qemu-system-common runc crun podman conmon containerd catatonit libseccomp2 uidmap iproute2 criu \
  systemd dbus dbus-user-session openssl curl docker-registry skopeo nftables iputils-ping \
  debootstrap containernetworking-plugins
BENCH_PACKAGES := qemu-system-x86 qemu-system-common iproute2 runc crun busybox-static podman docker.io docker-registry \
  skopeo nftables

.PHONY: demo test check kernels bench fuzz setup dev clean

demo: setup  ## set everything up and boot the built-in guest
	$(VENV)/bin/pyhv boot

test: check kernels  ## set everything up and run the tests
	$(PY) -m pytest -n 2 --dist loadfile

kernels: dev  ## build those that the tests boot, unless the cache has them
	for flavour in micro smp image; do $(VENV)/bin/pyhv kernel build $$flavour || exit 1; done

check: dev  ## formatter, linter, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: dev  ## measure, beside the peers
	./scripts/system-packages $(BENCH_PACKAGES)
	$(VENV)/bin/pyhv bench boot
	$(VENV)/bin/pyhv bench io
	$(VENV)/bin/pyhv bench container
	$(VENV)/bin/pyhv kernel build micro
	$(VENV)/bin/pyhv kernel build image
	$(VENV)/bin/pyhv bench snapshot
	$(VENV)/bin/pyhv bench run

fuzz: dev  ## 60 seconds for each parser of what guests and other programs send
	PYTHONPATH=.:tests $(PY) -m fuzz --seconds 60

setup: $(VENV)/.installed

dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml Makefile
	./scripts/system-packages $(SYSTEM_PACKAGES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV) || /usr/bin/python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -e .
	./scripts/link-checkout $(VENV)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	./scripts/system-packages $(TEST_PACKAGES)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	./scripts/link-checkout $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
