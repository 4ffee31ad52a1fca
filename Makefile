# graft: 'make demo' shows it, 'make test' proves it. Both install what is missing (as root) and leave nothing behind.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PYTHON := .venv/bin/python3
CLANG ?= clang
MULTIARCH = $(shell gcc -print-multiarch 2>/dev/null || $(CLANG) -print-multiarch 2>/dev/null)
BPF_SOURCES := csrc/graft.bpf.c $(wildcard csrc/*.h)
BPF_OBJECT := graft/graft.bpf.o
TUNNELS := graft/graft-tunnels.bpf.o
ENTRANCE := graft/graft-entrance.bpf.o
# no path of the tree that they are built in stands in the objects: two builds anywhere are equal
SAME := '-ffile-prefix-map=$(CURDIR)/=' '-ffile-prefix-map=$(CURDIR)=.'
# CPPFLAGS, CFLAGS, LDFLAGS: what a package's builder adds
COMPILE = $(CC) -O2 -g -Wall -Wextra -Werror $(SAME) $(CPPFLAGS) $(CFLAGS) $(LDFLAGS)
BPF_COMPILE = $(CLANG) -O2 -g $(SAME) -target bpf -Wall -Wextra -Werror $(addprefix -I/usr/include/,$(MULTIARCH)) -c $< -o $@
HELPER := graft/graft-sup
DEPUTY := graft/graft-deputy
RELAY := graft/graft-relay
PLUGIN := graft/graft-plugin
HELPER_SOURCES := csrc/sup.c csrc/sup_calls.c csrc/sup_bind.c csrc/sup_sockets.c
SHIM := graft/graft-shim.so
RUNTIME := graft/graft-runtime
FRONT := graft/graft-front
LIVE := graft/graft-live.so
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' graft/__init__.py)
MANUAL := $(patsubst man/%.md,build/man/%,$(wildcard man/*.md))

# make test-engines
ENGINES := engine_versions cgroups docker docker_stores move_docker podman netavark cri joined runtimes direct_docker direct_podman direct_cri direct_runtimes engine_attacks documents rootless_podman rootless_docker rootless_attacks

# make fresh
SUITE := bookworm
COMMANDS := 'make demo' 'make test'

.PHONY: all compiled demo soak torture fuzz inside test unit lint test-core test-kernel test-kernels test-arm64 test-engines test-kubernetes
.PHONY: test-swarm test-programs test-packages site bench build deb release fresh wheel manual install uninstall clean help
.PHONY: setup setup-install setup-deb setup-bench setup-check setup-test setup-arm64 setup-kubernetes

all: build

help:
	@echo "make demo          install what is missing, show graft at work with nginx"
	@echo "make test          install what is missing, run every test on this kernel"
	@echo "make build         .venv and the compiled parts, so that bin/graft and single tests run; installs no package"
	@echo "make unit lint     install what is missing, run the tests that need no root"
	@echo "make test-core     the kernel half and the core of the system tests, on this kernel; half a minute"
	@echo "make test-kernel   the kernel half on Debian's stock 6.1 kernel, in emulation"
	@echo "make test-kernels  the same and attacks on Debian's 6.1 to 7.3, which takes hours, and docs/kernels.md; KERNELS=\"6.12 7.3\""
	@echo "make test-arm64    everything built for arm64, and the kernel half on Debian's arm64, in emulation"
	@echo "make test-engines  Docker, Podman, containerd, runc and crun of this system; of Debian 13: make fresh SUITE=trixie COMMANDS=\"'make test-engines'\""
	@echo "make test-kubernetes  pods under a real kubelet; the first time it builds Kubernetes 1.20 (a quarter of an hour); ARGS=\"-k probes\""
	@echo "make test-swarm    services of Docker's swarm on three nodes in three network namespaces; 3 minutes"
	@echo "make test-programs named servers and clients (FTP, SIP, resolvers, databases), under graft and on the host; ARGS=\"-k vsftpd\""
	@echo "make bench         graft bench: graft beside the host and what else is installed; BENCH=--quick for a look"
	@echo "make torture       kill -9 graftd, its keeper, both, 100 times under load; ROUNDS=n"
	@echo "make soak          real programs for an hour, and what grew meanwhile; TIME=10m"
	@echo "make fuzz          ten minutes of nonsense for everything that reads from others; TIME=1h"
	@echo "make inside        random socket calls inside containers for an hour, the host watched; TIME=600 (seconds), SEED=n"
	@echo "make fresh         both of the first two, in an empty Debian made for it; SUITE=trixie, COMMANDS=\"'make unit'\""
	@echo "make deb           Debian packages graft and graft-bench in dist, for Debian 12 and 13 if they are made on 12"
	@echo "make release       wheels, sdist, Debian packages, changelog, bill of materials and checksums in dist/release"
	@echo "make test-packages install, upgrade, remove them on empty Debian systems 12 and 13 with a real systemd; the wheels, too; 5 minutes"
	@echo "make wheel         a wheel with the compiled BPF object"
	@echo "make manual        the manual pages in build/man, from man/*.md"
	@echo "make site          the documents as a site in build/site/html; a link that leads nowhere is an error"
	@echo "make install       graft under PREFIX (/opt/graft), links in /usr/local/bin, manual pages, completion, graft.h, units"
	@echo "make uninstall     take that away again; PREFIX, BINDIR, DATADIR and DESTDIR as for make install"
	@echo "make clean         remove .venv and what was built"

setup:
	@scripts/setup.sh run

setup-install:
	@scripts/setup.sh run install

setup-deb:
	@scripts/setup.sh run install check deb

setup-bench:
	@scripts/setup.sh run bench

setup-test:
	@scripts/setup.sh run install bench check test kernel

setup-kubernetes:
	@scripts/setup.sh run install bench check test kubernetes

setup-arm64:
	@scripts/setup.sh run install bench check test kernel cross

setup-check:
	@scripts/setup.sh run install check

fresh:
	@scripts/fresh.sh $(SUITE) $(COMMANDS)

.venv/stamp: pyproject.toml
	@echo "graft: virtual environment in .venv"
	@test -x $(PYTHON) || python3 -m venv .venv
	@$(PYTHON) scripts/requirements.py | $(PYTHON) -m pip install -q --disable-pip-version-check -r /dev/stdin
	@touch $@

$(BPF_OBJECT): $(BPF_SOURCES)
	@echo "graft: compile $@"
	@$(BPF_COMPILE)

$(TUNNELS): csrc/tunnels.bpf.c csrc/abi.h csrc/listener.bpf.h csrc/owners.bpf.h
	@echo "graft: compile $@"
	@$(BPF_COMPILE)

$(ENTRANCE): csrc/entrance.bpf.c
	@echo "graft: compile $@"
	@$(BPF_COMPILE)

$(HELPER): $(HELPER_SOURCES) csrc/sup_parts.h csrc/sup.h csrc/abi.h csrc/architecture.h
	@echo "graft: compile $@"
	@$(COMPILE) -pthread $(HELPER_SOURCES) -o $@

# static, because it is started for each call: 0.7 ms instead of 1.1
$(DEPUTY): csrc/deputy.c csrc/deputy.h
	@echo "graft: compile $@"
	@$(COMPILE) -static $< -o $@

$(RELAY): csrc/relay.c csrc/relay_cage.c csrc/relay.h csrc/architecture.h
	@echo "graft: compile $@"
	@$(COMPILE) -static csrc/relay.c csrc/relay_cage.c -o $@

# static, because it is alone in its root file system
$(PLUGIN): csrc/plugin.c
	@echo "graft: compile $@"
	@$(COMPILE) -static $< -o $@

# with no library, and so without what gcc calls for an atomic operation on arm64
$(SHIM): INLINE = $(if $(filter aarch64%,$(shell $(CC) -dumpmachine)),-mno-outline-atomics)
$(SHIM): csrc/shim.c csrc/sup.h
	@echo "graft: compile $@"
	@$(CC) -O2 -g -Wall -Wextra -Werror $(SAME) -fPIC -shared -nostdlib -ffreestanding -fno-stack-protector \
		-fvisibility=hidden $(INLINE) $< -o $@

$(RUNTIME): csrc/runtime.c csrc/runtime_hooks.c csrc/runtime.h graft/__init__.py
	@echo "graft: compile $@"
	@$(COMPILE) -DVERSION='"$(VERSION)"' csrc/runtime.c csrc/runtime_hooks.c -o $@

# static, because it is started for each `graft run`
$(FRONT): csrc/front.c csrc/live.c csrc/live.h graft/__init__.py
	@echo "graft: compile $@"
	@$(COMPILE) -static -DVERSION='"$(VERSION)"' csrc/front.c csrc/live.c -o $@

$(LIVE): csrc/live.c csrc/live.h
	@echo "graft: compile $@"
	@$(COMPILE) -fPIC -shared -fvisibility=hidden $< -o $@

compiled: $(BPF_OBJECT) $(TUNNELS) $(ENTRANCE) $(HELPER) $(DEPUTY) $(RELAY) $(PLUGIN) $(SHIM) $(RUNTIME) $(FRONT) $(LIVE)

build: .venv/stamp compiled

demo: setup
	@$(MAKE) --no-print-directory build
	@$(PYTHON) scripts/demo.py

test: setup-test
	@$(MAKE) --no-print-directory build
	@scripts/test.sh

unit: setup-check
	@$(MAKE) --no-print-directory build
	@$(PYTHON) -m pytest -q tests/unit

lint: setup-check
	@$(MAKE) --no-print-directory build
	@$(PYTHON) -m pytest -q tests/test_lint.py tests/test_wings.py tests/test_site.py

test-core: setup-test
	@$(MAKE) --no-print-directory build
	@$(PYTHON) scripts/steady.py -n $$(($$(nproc) + 1)) -m "core or kernel" tests/kernel tests/system

test-kernel: setup-test
	@$(MAKE) --no-print-directory build
	@GRAFT_KERNEL_TESTS=core scripts/kernels.sh 6.1

# each takes a quarter of an hour and more; what came of them is written even where a test failed
test-kernels: setup-test
	@$(MAKE) --no-print-directory build
	@GRAFT_KERNEL_TIMEOUT=$${GRAFT_KERNEL_TIMEOUT:-7200} scripts/kernels.sh $(KERNELS) && failed=0 || failed=1; \
		$(PYTHON) scripts/kernels.py --write >/dev/null; exit $$failed

test-arm64: setup-arm64
	@$(MAKE) --no-print-directory test-kernels KERNELS=6.12-arm64

test-engines: setup-test
	@$(MAKE) --no-print-directory build
	@for program in dockerd podman containerd runc crun; do $$program --version | head -1; done
	@GRAFT_SLOWNESS=$${GRAFT_SLOWNESS:-3} $(PYTHON) scripts/steady.py -n $$(($$(nproc) + 1)) $(ENGINES:%=tests/system/test_%.py)

test-kubernetes: setup-kubernetes
	@$(MAKE) --no-print-directory build
	@scripts/kubernetes.sh $(ARGS)

test-swarm: setup-test
	@$(MAKE) --no-print-directory build
	@dockerd --version
	@GRAFT_SLOWNESS=$${GRAFT_SLOWNESS:-3} $(PYTHON) -m pytest -q -m swarm --timeout 600 tests/system/test_swarm.py

test-programs: setup-test
	@$(MAKE) --no-print-directory build
	@scripts/programs.sh $(ARGS)

bench: setup-bench
	@$(MAKE) --no-print-directory build
	@bin/graft bench $(BENCH)

torture: setup-test
	@$(MAKE) --no-print-directory build
	@$(PYTHON) -m tests.endurance.torture $(or $(ROUNDS),100)

soak: setup-bench
	@$(MAKE) --no-print-directory build
	@$(PYTHON) -m tests.endurance.soak $(or $(TIME),1h)

fuzz: setup-test
	@$(MAKE) --no-print-directory build
	@$(PYTHON) scripts/fuzz.py $(or $(TIME),10m)

inside: setup-test
	@$(MAKE) --no-print-directory build
	@$(PYTHON) -m tests.endurance.inside --seconds $(or $(TIME),3600) --seed $(or $(SEED),1)

deb: setup-deb .venv/stamp
	@scripts/deb.sh

test-packages: setup-deb
	@$(MAKE) --no-print-directory build
	@scripts/packages.sh $(ARGS)

release: setup-deb .venv/stamp
	@scripts/release.sh

wheel: build
	@$(PYTHON) -m pip wheel -q --no-deps -w dist .
	@ls dist/*.whl

# the first line, "# graft(1)", becomes the header with the version
build/man/%: man/%.md graft/__init__.py
	@mkdir -p $(@D)
	@sed -E '1s/^# (.+)\((.)\)$$/# \1 \2 "" "graft $(VERSION)" "graft"/' $< | go-md2man -out $@

manual: $(MANUAL)

site: setup-check
	@$(MAKE) --no-print-directory build
	@$(PYTHON) -m sphinx -q -W --keep-going -n -b html -d build/site/doctrees -c docs/site . build/site/html
	@echo "graft: build/site/html/index.html"

install: setup-install
	@scripts/install.sh

uninstall:
	@scripts/install.sh remove

clean:
	rm -rf .venv build dist *.egg-info $(BPF_OBJECT) $(TUNNELS) $(ENTRANCE) $(HELPER) $(DEPUTY) $(RELAY) $(PLUGIN) $(SHIM) $(RUNTIME) $(FRONT) $(LIVE)
	find . -name __pycache__ -prune -exec rm -rf {} +
