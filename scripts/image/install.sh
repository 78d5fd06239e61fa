#!/usr/bin/env bash
# Install what the image holds, all of it below /opt. Runs: build, as root (Containerfile and apptainer.def call it).
#   install.sh dependencies    Debian's packages, Python's of requirements.lock, flash-attn
#   install.sh bridge          our own program and configurations, which change more often
# Each part ends by proving itself. A build may bind scripts/image to /mnt; what scripts/host/build.sh laid into its
# folder inputs/ is then used, and stays out of the image:
#   certificates.crt    the host's certificates, for sites whose proxy inspects TLS
#   flash_attn-*.whl    a wheel of flash-attn, instead of the release's
set -euo pipefail
umask 022
unset PYTHONPATH PYTHONHOME

flash_attn_release=https://github.com/Dao-AILab/flash-attention/releases/download/v2.7.4.post1
flash_attn_wheel=flash_attn-2.7.4.post1+cu12torch2.6cxx11abiFALSE-cp311-cp311-linux_x86_64.whl
flash_attn_sha256=58853b28a5a926cae14402bfd8d4d93a45ebf8f9e79533f37ab09d0d77a99c05

uv() { # Python cannot write its byte code at run time, since the image is read-only: it is compiled here.
    UV_CACHE_DIR=/opt/uv/cache UV_COMPILE_BYTECODE=1 UV_SYSTEM_CERTS=1 VIRTUAL_ENV=/opt/venv /opt/uv/bin/uv "$@"
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
    rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log
}

python_packages() {
    local bundle=/etc/ssl/certs/ca-certificates.crt wheels
    [[ ! -s /mnt/inputs/certificates.crt ]] || bundle=/mnt/inputs/certificates.crt
    export SSL_CERT_FILE=$bundle PIP_CERT=$bundle
    python3.11 -m venv /opt/uv
    /opt/uv/bin/pip install --quiet --no-cache-dir --disable-pip-version-check --no-deps --require-hashes \
        -r /opt/bridge/requirements-uv.lock
    uv venv --quiet --python /usr/bin/python3.11 /opt/venv
    # One package of the lock is source, in plain Python: what builds it is pinned too.
    uv pip install --no-deps --require-hashes --build-constraints /opt/bridge/requirements.lock -r /opt/bridge/requirements.lock
    wheels=(/mnt/inputs/flash_attn-*.whl)
    if [[ -f ${wheels[0]} ]]; then
        uv pip install --no-deps "${wheels[0]}"
    else
        uv pip install --no-deps --require-hashes -r - \
            <<< "flash-attn @ $flash_attn_release/$flash_attn_wheel --hash=sha256:$flash_attn_sha256"
    fi
    rm -rf /opt/uv
}

prove_dependencies() {
    # torch.cuda.nccl.version() is a constant of torch's build: the library that is loaded has to be asked.
    PYTHONNOUSERSITE=1 PYTHONDONTWRITEBYTECODE=1 HOME=$(mktemp -d) /opt/venv/bin/python - << 'PYTHON'
import ctypes, importlib.metadata, re
import torch, vllm, verl, flash_attn

nccl = ctypes.c_int()
[path] = set(re.findall(r"\S*libnccl\.so\S*", open("/proc/self/maps").read()))
ctypes.CDLL(path).ncclGetVersion(ctypes.byref(nccl))
print(f"proved: torch {torch.__version__}, vllm {vllm.__version__}, verl {verl.__version__}, "
      f"flash-attn {importlib.metadata.version('flash-attn')}, NCCL {nccl.value} ({path})")
assert nccl.value == 22203
PYTHON
}

case ${1:-} in
dependencies)
    debian_packages
    python_packages
    prove_dependencies
    ;;
bridge)
    find /opt/bridge -name __pycache__ -prune -exec rm -rf {} +
    # Editable, so that it finds configs/ and the lock beside it. Debian's venv module brought this pip; the lock, setuptools.
    PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl) /opt/venv/bin/python -m pip install --quiet --no-cache-dir \
        --disable-pip-version-check --no-index --no-deps --no-build-isolation --editable /opt/bridge
    /opt/venv/bin/python -m compileall -q /opt/bridge/scripts
    /opt/venv/bin/bridge --help > /dev/null
    echo "proved: bridge --help"
    ;;
*)
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
chmod -R a+rX /opt
