# Makes .venv with the pinned versions, or finds it made, and activates it.
# quickstart.sh and test.sh source it from the repository's root.
set -e
python=
for name in python3 python3.13 python3.12 python3.11; do
  if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$name
    break
  fi
done
if [ -z "$python" ]; then
  echo "error: no Python 3.11 or newer was found; install one and run this again" >&2
  exit 2
fi

stamp=.venv/kantai-$(cat constraints.txt pyproject.toml | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
  echo "installing into .venv (once; some minutes)"
  "$python" -m venv .venv || {
    echo "error: $python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
  }
  install() {
    .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check \
      --constraint constraints.txt "$@"
  }
  # torch first: DeepSpeed's set-up looks for it. DeepSpeed compiles what it needs when it needs it.
  install setuptools wheel ninja py-cpuinfo torch
  DS_BUILD_OPS=0 install --no-build-isolation --editable '.[test]'
  rm -f .venv/kantai-*
  touch "$stamp"
fi
. .venv/bin/activate
