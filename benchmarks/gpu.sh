#!/usr/bin/env bash
# Measures correctness and speed on this machine's GPU in under ten minutes: parity, ceilings, inference, training.
#   benchmarks/gpu.sh                 all sections; writes benchmarks/results/gpu-DATE-NAME.json
#   benchmarks/gpu.sh --quick         under a minute
#   benchmarks/gpu.sh --help          all options
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3 || true)"
if [ -z "$python" ]; then
  echo "gpu.sh: neither .venv/bin/python nor python3 was found" >&2
  exit 2
fi

missing="$("$python" -c '
from importlib.util import find_spec
print(*(name for name in ("torch", "numpy", "einops", "pydantic", "cv2") if find_spec(name) is None))')"
if [ -n "$missing" ]; then
  echo "gpu.sh: $python cannot import: $missing. Run 'make setup', or install them for that Python" >&2
  exit 2
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "$python" "$root/benchmarks/gpu.py" "$@"
