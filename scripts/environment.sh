# shellcheck shell=bash
# Sourced by the launchers with `root`, the repository: sets `python`, and puts the repository first on PYTHONPATH,
# because a stray third-party package called utils would otherwise win.
#
# ODP_ENV names another virtual environment than .venv; without either, python3 of the PATH is taken.

root=${root:?the repository, set by the launcher that sources this file}
if [[ -n ${ODP_ENV:-} ]]; then
    python=$ODP_ENV/bin/python
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
if ! command -v "$python" > /dev/null; then
    echo "error: there is no $python: run 'make install' in $root, or set ODP_ENV to a virtual environment" >&2
    exit 1
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
