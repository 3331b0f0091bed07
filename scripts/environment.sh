# shellcheck shell=bash
# Sourced by the launchers with `root`, the repository: reads scripts/site.env where there is one, sets `python` (the
# words to call it by), and puts the repository first on PYTHONPATH, because a stray third-party package called utils
# would otherwise win.
#
# ODP_ENV names another virtual environment than .venv; without either, python3 of the PATH is taken.

root=${root:?the repository, set by the launcher that sources this file}
if [[ -f $root/scripts/site.env ]]; then
    set +eu # modules are not made for these
    # shellcheck source=scripts/site.env.example
    source "$root/scripts/site.env"
    set -eu
fi
if [[ -n ${ODP_ENV:-} ]]; then
    python=$ODP_ENV/bin/python
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
# shellcheck disable=SC2206
python=(${ODP_CONTAINER:-} "$python")
if ! "${python[@]}" -c '' > /dev/null; then
    echo "error: ${python[*]} does not run: 'make install' in $root, or set ODP_ENV to a virtual environment" >&2
    exit 1
fi
export PYTHONUNBUFFERED=1 # a job's log shows at once what is printed
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
