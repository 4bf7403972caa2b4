#!/usr/bin/env bash
# Makes .venv-0.33, in which the plugin's tests run on vLLM 0.33, of which PyPI has no CPU build: its Python, from the
# sdist, over the binaries and the other packages of .venv (0.32). Needs `make setup` first; half a minute, 140 MB.
#
#   scripts/setup_vllm_0.33.sh && .venv-0.33/bin/python -m pytest tests/vllm_plugin/test_config.py
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.33.0
venv=${VENV:-.venv-0.33}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

site_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# pip asks an sdist for its metadata before it keeps it, which takes these packages and no compiler.
.venv/bin/python -m pip install --quiet --no-deps --target "$tmp/build" \
  'setuptools>=77' setuptools-rust setuptools-scm semantic-version vcs-versioning wheel
PYTHONPATH=$tmp/build VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$version .venv/bin/python -m pip download --quiet \
  --no-deps --no-build-isolation --no-binary :all: --dest "$tmp" "vllm==$version"

[ -x "$venv/bin/python" ] || .venv/bin/python -m venv "$venv"
base=$(site_of .venv)
site=$(site_of "$venv")
echo "$base" > "$site/zz_base.pth" # found after the venv's own packages; the .pth files in there are not read
tar -xzf "$tmp"/vllm-*.tar.gz -C "$site" --strip-components=1 "vllm-$version/vllm"
ln -sf "$base"/vllm/*.so "$site/vllm/"
info=$site/vllm-$version+cpu.dist-info
mkdir -p "$info"
tar -xzf "$tmp"/vllm-*.tar.gz -O "vllm-$version/PKG-INFO" | sed "s/^Version: .*/Version: $version+cpu/" > "$info/METADATA"
echo rowint8 > "$info/INSTALLER"
: > "$info/RECORD"
"$venv/bin/pip" install --quiet --no-compile --no-deps 'orjson>=3.11.6' -e .
cat > "$venv/bin/vllm" << PY
#!$PWD/$venv/bin/python
import sys

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":  # the engine core is spawned and imports this file again
    sys.exit(main())
PY
chmod +x "$venv/bin/vllm"
"$venv/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
