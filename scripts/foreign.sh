#!/bin/bash
# foreign.sh - make the root of a Debian of another architecture, to be booted in emulation
#
#   scripts/foreign.sh ARCHITECTURE SUITE SET DIRECTORY
#
# It has the essential packages and those of SET in packages.txt. They are unpacked, and none of their scripts runs,
# because these are programs of the other architecture; what tests need of the scripts' work is done here.
set -euo pipefail
architecture=$1 suite=$2 set=$3 directory=$4
table=$(dirname "$0")/packages.txt
root=$directory/root

lists=$(mktemp -d /tmp/graft-lists-XXXX)
trap 'rm -rf "$lists"' EXIT
mkdir -p "$lists/lists/partial" "$lists/archives/partial"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keyring] $(scripts/mirror.sh) $suite main" >"$lists/sources.list"
touch "$lists/status"
apt=(-qq -o "APT::Architecture=$architecture" -o "APT::Architectures=$architecture" -o APT::Install-Recommends=false -o APT::Sandbox::User=root
	-o Dir::Etc::SourceList="$lists/sources.list" -o Dir::Etc::SourceParts=/dev/null
	-o Dir::State="$lists" -o Dir::State::Lists="$lists/lists" -o Dir::State::status="$lists/status"
	-o Dir::Cache::Archives="$lists/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
apt-get "${apt[@]}" update
mapfile -t wanted < <(awk -v set="$set" '$1 == set { print $2 }' "$table")
echo "foreign: fetch ${wanted[*]} and what is essential of $suite for $architecture"
apt-get "${apt[@]}" -y -o Debug::NoLocking=1 --download-only install '?essential' "${wanted[@]}" >/dev/null

rm -rf "$directory"
mkdir -p "$root"
for package in "$lists"/archives/base-files_*.deb "$lists"/archives/*.deb; do # the first has the links of /bin and /lib
	dpkg-deb -x "$package" "$root"
done
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
for name in awk:mawk iptables:xtables-nft-multi ip6tables:xtables-nft-multi iptables-save:xtables-nft-multi; do
	target=$(cd "$root" && compgen -G "usr/*bin/${name#*:}" | head -1) || continue
	ln -sf "/$target" "$root/usr/bin/${name%:*}"
done
sed 's/:.*/:*:19000:0:99999:7:::/' "$root/etc/passwd" >"$root/etc/shadow"
echo "127.0.0.1 localhost" >"$root/etc/hosts"
mkdir -p "$root"/{graft,results,opt,srv,media,mnt,etc/lvm}
touch "$directory/complete"
