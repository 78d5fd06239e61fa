# shellcheck shell=bash disable=SC2154 # paths.sh sets home
# What a container does not show of its host: how Apptainer is installed, and the home. Runs: host, sourced by container.sh.
#   source scripts/host/site.sh; printf %s "$BRIDGE_HOST_CHECKS"
# For the report of `bridge check`, a line each: ok or warn, name, what was seen, with tabs between.

export BRIDGE_HOST_CHECKS=''
finding() { printf -v BRIDGE_HOST_CHECKS '%s%s\t%s\t%s\n' "$BRIDGE_HOST_CHECKS" "$@"; }

# Root needs neither namespaces nor setuid.
if [[ $ENGINE == @(apptainer|singularity) && $EUID != 0 ]]; then
    setuid='' libexec=$("$ENGINE" buildcfg 2> /dev/null | sed -n 's/^LIBEXECDIR=//p') || libexec=''
    for file in "$libexec"/{apptainer,singularity}/bin/starter-suid; do [[ ! -u $file ]] || setuid="not needed: $file"; done
    if [[ -n $setuid ]] || said=$(unshare --user --map-root-user true 2>&1); then
        finding ok "user namespaces" "${setuid:-there}"
    else
        said="none (${said//$'\n'/ }), and $ENGINE is not setuid: it hardly starts a container. Ask the administrator for them"
        said+=" (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone), or for the package apptainer-suid."
        finding warn "user namespaces" "$said"
        # Where no container starts, there is no report.
        echo "bridge: warning: user namespaces: $said" >&2
    fi
    # One process unpacks what all ranks read (apptainer#665). How long a start takes is in docs/image.md.
    [[ -n $setuid || -d $IMAGE ]] || finding warn "image mount" "squashfuse, as $ENGINE is not setuid: starts take a third \
longer. For many: $ENGINE build --sandbox /local/bridge $IMAGE, then IMAGE=/local/bridge; or the package apptainer-suid."
fi

# Only writing shows a quota. 5 GiB, a guess, is much of a small home; counting may take long.
said='' caches='no large cache'
file=$(mktemp "$home/.bridge-check.XXXXXX" 2> /dev/null) && head -c 1048576 /dev/zero 2> /dev/null > "$file" ||
    said="$home does not take 1 MiB (full, a quota, or read-only). "
rm -f -- "$file"
sizes=$(timeout 3 du -sk "$home"/.{apptainer,singularity,cache} 2> /dev/null) || [[ $? != 124 ]] || caches='caches not counted'
while read -r kib folder; do ((kib < 5 << 20)) || said+="$folder holds $((kib >> 20)) GiB. "; done <<< "$sizes"
[[ -n $said ]] || finding ok home "$home takes files; $caches"
[[ -z $said ]] || finding warn home "${said}Empty it (apptainer cache clean), and export APPTAINER_CACHEDIR=/larger/disk."
