#!/bin/sh
# The steps of the image, in one place: installs moa_serve from this folder into PREFIX; with `bake` the default base too.
# Dockerfile runs it, and so does CI in a clean folder.
#   docker/install.sh PREFIX [bake]
# PIP_ARGS may hold further arguments for pip, such as the index of torch's CPU wheels.
set -eu
prefix=$1
cd "$(dirname "$0")/.."
python3 -m venv "$prefix"
# shellcheck disable=SC2086  # several arguments are wanted
"$prefix/bin/pip" install --no-cache-dir -q ${PIP_ARGS:-} -c docker/constraints.txt '.[otel]'
if [ "${2:-}" = bake ]; then
    MOA_CACHE_DIR="$prefix/share/moa_serve" "$prefix/bin/python" -c \
        'import torch; from moa_serve.model.weights import load_base; print("baked", load_base(None, dtype=torch.bfloat16).name)'
fi
"$prefix/bin/moa-serve" --version
