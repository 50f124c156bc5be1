#!/usr/bin/env bash
# Builds one virtual environment per peer whose pins cannot share ours; prints what could not be installed.
#
#   bash benchmarks/peers/setup.sh [litert] [nncf] [modelopt] [spconv]      (all of them without arguments)
#
# They lie in $EDGEKIT_PEERS (default ~/.cache/edgekit/peers)/venv-<name>, with a file `ready` in each that works.
# $PYTHON is the interpreter of the environment that runs run.py: modelopt and spconv borrow their torch from there.
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-.venv/bin/python}
HOME_OF_PEERS=${EDGEKIT_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/edgekit/peers}
mkdir -p "$HOME_OF_PEERS"

make_venv() { # name: an empty environment, whose folder it prints
    local folder="$HOME_OF_PEERS/venv-$1"
    rm -rf "$folder"
    "$PYTHON" -m venv "$folder" && echo "$folder"
}

setup_litert() {
    local venv
    venv=$(make_venv litert) || return
    # onnx2tf pins versions that exclude each other; these work together, TensorFlow is not needed
    "$venv/bin/pip" install -q numpy==2.4.6 onnx==1.23.2 onnxruntime==1.31.1 ai-edge-litert==2.3.0 \
        ai-edge-quantizer==0.10.0 onnxsim==0.8.1 onnxslim==0.1.98 onnxscript==0.7.2 h5py psutil tqdm \
        opencv-python-headless==5.0.0.93 &&
        "$venv/bin/pip" install -q --no-deps sne4onnx==2.0.1 sng4onnx==2.0.1 &&
        "$venv/bin/pip" install -q --no-deps --ignore-requires-python onnx2tf==2.6.9 &&
        "$venv/bin/python" -c "import onnx2tf, ai_edge_quantizer, ai_edge_litert" && touch "$venv/ready"
}

setup_nncf() {
    local venv
    venv=$(make_venv nncf) || return
    "$venv/bin/pip" install -q nncf==3.4.0 openvino==2026.4.1 numpy==2.4.6 onnx==1.23.2 &&
        "$venv/bin/python" -c "import nncf, openvino" && touch "$venv/ready"
}

setup_modelopt() {
    local venv torch_home
    venv=$(make_venv modelopt) || return
    torch_home=$("$PYTHON" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])") || return
    # torch, onnx and onnxruntime come from the environment of edgekit: modelopt's own pins would fetch CUDA builds
    echo "$torch_home" >"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/host.pth"
    "$venv/bin/pip" install -q --no-deps nvidia-modelopt==0.47.0 onnx-graphsurgeon==0.6.1 onnxconverter-common \
        nvidia-ml-py ninja tqdm rich regex safetensors pulp pydantic pydantic-core annotated-types typing-inspection scipy \
        omegaconf antlr4-python3-runtime==4.9.3 PyYAML polygraphy cppimport lief mako onnxslim==0.1.98 &&
        "$venv/bin/python" -c "import modelopt.onnx.quantization" && touch "$venv/ready"
}

setup_spconv() {
    local venv torch_home
    venv=$(make_venv spconv) || return
    torch_home=$("$PYTHON" -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])") || return
    echo "$torch_home" >"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/zz_host.pth"
    "$venv/bin/pip" install -q --no-deps spconv==2.3.8 cumm==0.7.11 pccm==0.4.16 ccimport==0.4.4 fire termcolor \
        portalocker lark ninja requests pybind11 &&
        "$venv/bin/python" -c "import spconv.pytorch" 2>/dev/null && touch "$venv/ready"
}

failed=0
for name in "${@:-litert nncf modelopt spconv}"; do
    for peer in $name; do
        echo "== $peer"
        if "setup_$peer"; then
            du -sm "$HOME_OF_PEERS/venv-$peer" | cut -f1 | xargs printf 'ready, %s MB\n'
        else
            echo "peer $peer: cannot be installed here; the table will say so"
            failed=1
        fi
    done
done
exit $failed
