#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds its image: Python 3.11 or newer with two packages beside the grader.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
good() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
if ! good python3 && ! good python3.11; then
    apt-get update -q
    apt-get install -qy --no-install-recommends ca-certificates python3 python3-venv
    good python3 || apt-get install -qy --no-install-recommends python3.11 python3.11-venv  # Ubuntu 22.04 has both
fi
python=python3
good python3 || python=python3.11
"$python" -m venv .venv
grep -E '^(numpy|safetensors)==' requirements.txt >needed.txt
.venv/bin/python -m pip install -q -r needed.txt
