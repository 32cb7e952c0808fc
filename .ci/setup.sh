#!/bin/sh
# Finds a Python for environment.py, which builds .venv. R1_PYTHON=/path/to/python names one by hand.
cd "$(dirname "$0")/.." || exit 1
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

# An environment that runs needs no search, and finds out fastest whether it is up to date.
if [ -z "${R1_PYTHON:-}" ] && .venv/bin/python -c "$new_enough" 2>/dev/null; then
    exec .venv/bin/python .ci/environment.py "$@"
fi
# 3.11 first: constraints.txt was made with it.
for python in ${R1_PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
    if "$python" -c "import ensurepip, venv; $new_enough" 2>/dev/null; then
        exec "$python" .ci/environment.py "$@"
    fi
done
echo "set-up: ${R1_PYTHON:-none of the Pythons here} is not a Python >= 3.11 with venv and ensurepip:" \
    "install one (Debian: apt install python3 python3-venv) or name one with R1_PYTHON=/path/to/python" >&2
exit 1
