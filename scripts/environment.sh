# Makes or reuses .venv with everything pinned; sourced by the other scripts, from the repository's root.
# QTOOLKIT_PYTHON chooses the interpreter, QTOOLKIT_TORCH_INDEX a package index with the torch build to take.

TORCH=torch==2.13.0

say() { printf '%s\n' "$*" >&2; }
fail() { say "stopped: $*"; exit 1; }

make_environment() {
    local python=${QTOOLKIT_PYTHON:-python3} stamp log
    command -v "$python" >/dev/null || fail "there is no $python; install Python 3.11, 3.12 or 3.13, or set QTOOLKIT_PYTHON."
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' ||
        fail "$($python --version) cannot run vLLM for CPUs; set QTOOLKIT_PYTHON to Python 3.11, 3.12 or 3.13."
    stamp=.venv/installed-$( { cat requirements/cpu.txt pyproject.toml setup.py; echo "$TORCH"; } | cksum | cut -d' ' -f1)
    if [ ! -e "$stamp" ]; then
        say "installing into .venv (a few minutes the first time) ..."
        log=$(mktemp)
        [ -x .venv/bin/python ] || "$python" -m venv .venv || fail "python -m venv failed; on Debian install python3-venv."
        {
            .venv/bin/python -m pip install $TORCH ${QTOOLKIT_TORCH_INDEX:+--index-url "$QTOOLKIT_TORCH_INDEX"} &&
                .venv/bin/python -m pip install --no-deps -r requirements/cpu.txt &&
                .venv/bin/python -m pip install --no-deps --no-build-isolation -e .
        } >"$log" 2>&1 || { tail -n 20 "$log" >&2; fail "pip could not install the packages; the lines above say why."; }
        rm -f "$log" .venv/installed-*
        touch "$stamp"
    fi
    export PATH=$PWD/.venv/bin:$PATH
}
