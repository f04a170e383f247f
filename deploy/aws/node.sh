#!/usr/bin/env bash
# Prepares a machine for Ray. cluster.yaml runs it on every node, image.py once for an image; what is already done is not done again.
#   bash node.sh                         all of: scratch environment driver
#   bash node.sh environment             some of them
# Needs Python 3.11 or newer with venv, and a package index (PIP_INDEX_URL and UV_DEFAULT_INDEX name another one than PyPI).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lock=${RESSHIFT_LOCK:-$here/requirements.lock}
pci=${RESSHIFT_PCI:-/sys/bus/pci/devices}         # tests have their own
instance_store=${RESSHIFT_NVME:-/opt/dlami/nvme}  # where AWS's deep learning images mount instance stores
ray_files=${RESSHIFT_RAY_FILES:-/tmp/ray}

fail() { echo "node.sh: $*" >&2; exit 1; }

# Ray's files (spilled objects, logs, code of jobs) and cached weights go to the local NVMe disks, where the machine has some.
scratch() {
  if ! mountpoint -q "$instance_store"; then
    local disks disk
    mapfile -t disks < <(lsblk --noheadings --nodeps --paths --output NAME,MODEL | awk '/Instance Storage/ { print $1 }')
    case ${#disks[@]} in
      0) echo "node.sh: no instance store: Ray spills to the root disk"; return ;;
      1) disk=${disks[0]} ;;
      *) disk=/dev/md0; sudo mdadm --create "$disk" --run --level=0 --raid-devices="${#disks[@]}" "${disks[@]}" ;;
    esac
    sudo mkfs.ext4 -q -E lazy_itable_init=1 "$disk"
    sudo mkdir -p "$instance_store"
    sudo mount -o noatime "$disk" "$instance_store"
  fi
  sudo mkdir -p "$instance_store/ray" "$instance_store/cache" "$ray_files"
  sudo chown "$(id -u):$(id -g)" "$instance_store/ray" "$instance_store/cache"
  # Mounted under the path that Ray has on every node: workers take theirs from the head, which has no such disk.
  mountpoint -q "$ray_files" || sudo mount --bind "$instance_store/ray" "$ray_files"
  grep -q RESSHIFT_CACHE ~/.bashrc 2> /dev/null || echo "export RESSHIFT_CACHE=$instance_store/cache" >> ~/.bashrc
}

environment() {
  local want
  want=$(sha256sum < "$lock")
  [ "$(cat ~/venv/lock.sha256 2> /dev/null)" != "$want" ] || return 0 # an image of image.py, or not the first time
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is required, got $(python3 --version)"
  if ! [ -x ~/uv/bin/uv ]; then
    # ensurepip is a package of its own on Ubuntu; where it is missing, apt has it.
    python3 -m venv --clear ~/uv > /dev/null 2>&1 || {
      sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
      sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq python3-venv
      python3 -m venv --clear ~/uv
    }
    ~/uv/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
  fi
  # The interpreter of the image, which all nodes share: Ray refuses to mix versions. Nothing is fetched but packages.
  [ -x ~/venv/bin/python ] || ~/uv/bin/uv venv --quiet --no-python-downloads --python "$(command -v python3)" ~/venv
  ~/uv/bin/uv pip sync --quiet --python ~/venv/bin/python "$lock"
  echo "$want" > ~/venv/lock.sha256
}

# Ray counts the GPUs of a machine whether or not torch can use them.
driver() {
  grep -qs 0x10de "$pci"/*/vendor || return 0 # no device of NVIDIA
  ~/venv/bin/python - <<'PYTHON' || fail "the GPU of this machine cannot be used; another image or another wheel of torch is needed"
import sys
import torch

try:
    torch.zeros(1, device="cuda")
except (AssertionError, RuntimeError) as error:
    sys.exit(f"torch {torch.__version__} (CUDA {torch.version.cuda}): {str(error).splitlines()[0]}")
PYTHON
}

[ $# -gt 0 ] || set -- scratch environment driver
for part in "$@"; do
  case $part in
    scratch | environment | driver) "$part" ;;
    *) fail "no such part: $part; there are scratch, environment and driver" ;;
  esac
done
