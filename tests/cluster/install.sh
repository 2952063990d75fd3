#!/usr/bin/env bash
# Installs Debian's SLURM for `make test-cluster`, unless it is there. Without root or apt-get it does nothing, and
# the tests that need SLURM say so when they are skipped.
set -euo pipefail

missing=""
for program in slurmctld slurmd sbatch munged ip; do
    command -v "$program" >/dev/null || missing=yes
done
[[ -n $missing && $(id -u) -eq 0 ]] && command -v apt-get >/dev/null || exit 0
export DEBIAN_FRONTEND=noninteractive
# The packages start no daemon where there is no systemd; the tests start their own, elsewhere.
apt-get -qq update && apt-get -qq install --yes --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2 >/dev/null ||
    echo "SLURM could not be installed; the tests that need it are skipped" >&2
