#!/bin/bash
# mirror.sh - print the Debian mirror that packages and systems come from: MIRROR of the environment, else the one that
# this machine's apt uses, else Debian's own
set -euo pipefail

found=${MIRROR:-}
if [ -z "$found" ]; then
	# shellcheck disable=SC2016 # apt expands it
	found=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | sed -n 's|/*$||; /\/debian$/p' | sort -u | head -1)
fi
echo "${found:-http://deb.debian.org/debian}"
