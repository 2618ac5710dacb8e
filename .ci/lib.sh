# What .ci/image and .ci/arm64 share. `not` is the loud line of a machine that cannot do it, `work` a directory.

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }
cannot() { # why this machine is none for it
    [ "${IF_POSSIBLE:-}" = yes ] || die "$*"
    say "######## $not: $* ########"
    exit 0
}
again() { # a command that needs the network, or a lock that another apt holds: up to five times
    local try
    for try in 1 2 3 4; do
        "$@" && return
        say "try $try of 5 failed: $1; again in $((try * 10)) s"
        sleep $((try * 10))
    done
    "$@"
}
took() { printf '%d.%03d s' $((($(date +%s%N) - $1) / 1000000000)) $((($(date +%s%N) - $1) / 1000000 % 1000)); }
install_programs() { # those of these names that are not there, from the Debian packages of the same names
    local missing=() name
    for name in "$@"; do
        command -v "$name" > /dev/null || dpkg -s "$name" > /dev/null 2>&1 || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get > /dev/null || cannot "not installed: ${missing[*]}, and there is no apt-get to install them"
    say "installing ${missing[*]}"
    again apt_install "${missing[@]}" > "$work/apt.log" 2>&1 \
        || { tail -20 "$work/apt.log" >&2; cannot "apt-get could not install ${missing[*]}"; }
}
apt_install() { # lists first: those of an older machine name packages that the mirror has no more
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
    "${apt[@]}" update && DEBIAN_FRONTEND=noninteractive "${apt[@]}" install -y --no-install-recommends "$@"
}
