#!/bin/sh
# Install Debian packages that are missing: system-packages.sh SUDO APT PACKAGE...
# Elsewhere than on Debian and its relatives, say what is needed and go on.
set -e
sudo=$1 apt=$2
shift 2
if ! command -v dpkg-query >/dev/null; then
    echo "not a Debian system: please install what provides $*" >&2
    exit 0
fi
missing=""
for package in "$@"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ -z "$sudo" ] && [ "$(id -u)" != 0 ]; then
    echo "please run as root: apt-get install$missing" >&2
    exit 1
fi
echo "installing$missing"
$sudo env $apt update -qq
$sudo env $apt install -y -qq --no-install-recommends $missing >/dev/null
