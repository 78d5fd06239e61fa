#!/usr/bin/env bash
# Install what the image holds, all of it below /opt. Runs: build, as root (Containerfile and apptainer.def call it).
#   install.sh torch                        Debian's packages; of requirements.lock torch and NVIDIA's libraries, half of its size
#   install.sh dependencies [WHEEL]         the rest of it, and flash-attn
#   install.sh bridge                       our own program and configurations, which change more often
#   install.sh manifest COMMIT BASE [WHEEL] what is in the image and what it was made of: /opt/bridge/manifest.json
# Each part ends by proving itself. WHEEL is NAME@sha256:... of a wheel of flash-attn instead of the release's. A build may
# bind scripts/image to /mnt; what scripts/host/build.sh laid into its folder inputs/ stays out of the image: that wheel, and
# certificates.crt, the host's certificates, for sites whose proxy inspects TLS (or as a secret of that name).
set -euo pipefail
umask 022
unset PYTHONPATH PYTHONHOME
# Byte code is compiled here, since the image is read-only; with hashes instead of dates, so that two builds are the same.
export PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH
site=/opt/venv/lib/python3.11/site-packages

flash_attn_release=https://github.com/Dao-AILab/flash-attention/releases/download/v2.7.4.post1
flash_attn_wheel=flash_attn-2.7.4.post1+cu12torch2.6cxx11abiFALSE-cp311-cp311-linux_x86_64.whl
flash_attn_wheel+=@sha256:58853b28a5a926cae14402bfd8d4d93a45ebf8f9e79533f37ab09d0d77a99c05

uv() {
    UV_CACHE_DIR=/opt/uv/cache UV_SYSTEM_CERTS=1 VIRTUAL_ENV=/opt/venv /opt/uv/bin/uv "$@"
}

install_uv() { # for one step: no layer keeps it
    local bundle=/etc/ssl/certs/ca-certificates.crt file
    for file in /mnt/inputs/certificates.crt /run/secrets/certificates.crt; do [[ ! -s $file ]] || bundle=$file; done
    export SSL_CERT_FILE=$bundle PIP_CERT=$bundle
    python3.11 -m venv /opt/uv
    /opt/uv/bin/pip install --quiet --no-cache-dir --disable-pip-version-check --no-deps --require-hashes \
        -r /opt/bridge/requirements-uv.lock
}

debian_packages() {
    # Triton and Inductor compile at run time: gcc, g++ and Python's headers. Without the InfiniBand libraries NCCL
    # falls back to TCP in silence. tini reaps the zombies that Ray's workers leave where bridge is process 1.
    export DEBIAN_FRONTEND=noninteractive
    # In a build without root there is no user _apt.
    apt-get -q -o APT::Sandbox::User=root update
    apt-get -q -o APT::Sandbox::User=root install -y --no-install-recommends \
        ca-certificates g++ gcc ibverbs-providers libc6-dev libibverbs1 libpython3.11-dev librdmacm1 numactl \
        python3.11 python3.11-venv tini
    apt-get clean
    # Logs and caches of the build, with its dates in them.
    rm -rf /var/lib/apt/lists/* /var/log/* /var/cache/ldconfig/aux-cache /var/cache/debconf/*-old /etc/*-
}

torch_packages() {
    uv venv --quiet --python /usr/bin/python3.11 /opt/venv
    awk '/^[a-z]/ { chosen = /^(torch==|nvidia-)/ } chosen' /opt/bridge/requirements.lock |
        uv pip install --no-deps --require-hashes -r -
    # cuSOLVER for several GPUs in one process: nothing loads it.
    rm "$site/nvidia/cusolver/lib/libcusolverMg.so.11"
}

python_packages() { # [WHEEL]
    local wheel=${1:-$flash_attn_wheel} folder=$flash_attn_release
    [[ -z ${1:-} ]] || folder=file:///mnt/inputs
    # One package of the lock is source, in plain Python: what builds it is pinned too.
    uv pip install --no-deps --require-hashes --build-constraints /opt/bridge/requirements.lock -r /opt/bridge/requirements.lock
    uv pip install --compile-bytecode --no-deps --require-hashes -r - <<< "flash-attn @ $folder/${wheel%@*} --hash=${wheel#*@}"
}

leave_out() { # what nothing loads; docs/image.md has the sizes
    local name
    # Debug information is three quarters of Triton's library. Not in all packages: strip breaks what patchelf wrote.
    for name in cupy cupy_backends cupyx llguidance llvmlite triton uvloop xformers xgrammar; do
        find "$site/$name" -name '*.so' -exec strip --strip-debug {} +
    done
    rm -rf "$site/ray/jars"
    # When the wheel's file was written: no two builds would be the same.
    rm -f "$site"/flash_attn-*.dist-info/uv_cache.json
    sed -i '/uv_cache\.json/d' "$site"/flash_attn-*.dist-info/RECORD
}

prove_dependencies() {
    # torch.cuda.nccl.version() is a constant of torch's build: the library that is loaded has to be asked.
    HOME=/opt/home /opt/venv/bin/python - << 'PYTHON'
import ctypes, importlib, importlib.metadata, re
import torch, vllm, verl, flash_attn

# Those that were made smaller.
for name in ("cupy", "llguidance", "llvmlite.binding", "triton._C.libtriton", "uvloop", "xformers.ops", "xgrammar"):
    importlib.import_module(name)
nccl = ctypes.c_int()
[path] = set(re.findall(r"\S*libnccl\.so\S*", open("/proc/self/maps").read()))
ctypes.CDLL(path).ncclGetVersion(ctypes.byref(nccl))
print(f"proved: torch {torch.__version__}, vllm {vllm.__version__}, verl {verl.__version__}, "
      f"flash-attn {importlib.metadata.version('flash-attn')}, NCCL {nccl.value} ({path})")
assert nccl.value == 22203
PYTHON
    rm -rf /opt/home
}

case ${1:-} in
torch)
    debian_packages
    install_uv
    torch_packages
    rm -rf /opt/uv
    ;;
dependencies)
    install_uv
    python_packages "${2:-}"
    rm -rf /opt/uv
    leave_out
    prove_dependencies
    ;;
bridge)
    # A checkout may be closed to others. Not /opt/venv, which obeyed the umask: what is touched, this layer stores again.
    chmod -R u=rwX,go=rX /opt/bridge
    find /opt/bridge -name __pycache__ -prune -exec rm -rf {} +
    # Editable, so that it finds configs/ and the lock beside it. Debian's venv module brought this pip; the lock, setuptools.
    PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl) /opt/venv/bin/python -m pip install --quiet --no-cache-dir --no-compile \
        --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable /opt/bridge
    /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/bridge/scripts
    # A door for each stage, where Apptainer looks for apps: apptainer run --app ppo bridge.sif
    for stage in $(/opt/venv/bin/python -c 'from bridge.door import STAGES, TOOLS; print(*STAGES, *TOOLS)'); do
        mkdir -p "/scif/apps/$stage/scif"
        printf '#!/bin/sh\nexec bridge %s "$@"\n' "$stage" > "/scif/apps/$stage/scif/runscript"
        chmod 755 "/scif/apps/$stage/scif/runscript"
        /opt/venv/bin/bridge --help > "/scif/apps/$stage/scif/runscript.help"
    done
    echo "proved: bridge --help"
    ;;
manifest)
    /opt/venv/bin/python -m bridge.image.manifest "${2:-}" "${3:-}" "${4:-$flash_attn_wheel}" > /opt/bridge/manifest.json
    echo "proved: $(wc -l < /opt/bridge/manifest.json) lines of manifest"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
