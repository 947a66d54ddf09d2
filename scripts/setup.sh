# Sourced by scripts/demo, scripts/test and scripts/bench: system packages, then .venv.
# Safe to repeat: what is there is left alone.

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# need_packages NAME...: install those Debian/Ubuntu packages that are missing.
need_packages() {
    local missing=() name
    command -v apt-get >/dev/null || fail "this script installs packages with apt-get, which is not here;
install the counterparts of: $*"
    for name in "$@"; do
        dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q 'install ok installed' || missing+=("$name")
    done
    if [ ${#missing[@]} -eq 0 ]; then
        say "system packages: all there"
        return
    fi
    local install="apt-get install -y --no-install-recommends ${missing[*]}"
    local as_root=()
    if [ "$(id -u)" -ne 0 ]; then
        if ! sudo -n true 2>/dev/null; then
            printf 'These system packages are missing. Install them, then run this again:\n\n    sudo apt-get update && sudo %s\n\n' "$install" >&2
            exit 1
        fi
        as_root=(sudo -n)
    fi
    say "installing system packages: ${missing[*]}"
    "${lists_are_new:-false}" || "${as_root[@]}" apt-get update -q >/dev/null || fail "apt-get update failed"
    # shellcheck disable=SC2086  # the words of the line are meant
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive $install >/dev/null || fail "$install failed"
}

# first_known NAME...: the first of these packages that this distribution knows.
first_known() {
    local name
    for name in "$@"; do
        if apt-cache show "$name" >/dev/null 2>&1; then
            printf '%s\n' "$name"
            return
        fi
    done
}

# need_apt_lists: package lists, without which nothing can be looked up or downloaded.
need_apt_lists() {
    apt-cache show busybox-static >/dev/null 2>&1 && return
    lists_are_new=true
    if [ "$(id -u)" -eq 0 ]; then
        say "fetching package lists"
        apt-get update -q >/dev/null || fail "apt-get update failed"
    elif sudo -n true 2>/dev/null; then
        say "fetching package lists"
        sudo -n apt-get update -q >/dev/null || fail "apt-get update failed"
    else
        fail "there are no package lists; run: sudo apt-get update"
    fi
}

# need_venv LOCKFILE: a .venv with exactly the locked packages, and lumed itself.
need_venv() {
    local lock=$1 python=/usr/bin/python3
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || python=$(command -v python3) || fail "python3 is missing"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed; $python is $("$python" --version)"
    local stamp want
    stamp=.venv/.$(basename "$lock").sha256
    want=$(cat "$lock" pyproject.toml | sha256sum)
    if [ -x .venv/bin/lume ] && [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then
        say ".venv: up to date"
        return
    fi
    say "making .venv from $lock (about half a minute)"
    "$python" -m venv .venv || fail "cannot make .venv"
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r "$lock" 2> >(grep -v -e WARNING -e DEPRECATION -e '^note:' -e '^hint:' >&2) || fail "installing $lock failed"
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . 2> >(grep -v WARNING >&2) || fail "installing lumed failed"
    printf '%s\n' "$want" > "$stamp"
}
