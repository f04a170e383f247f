#!/usr/bin/env bash
# OpenStack Swift with its S3 API on loopback, one node, one copy, in a directory of its own. Debian or Ubuntu, as root.
#
#   tests/chaos/swift.sh PORT DIRECTORY      runs in the foreground until it is ended; access key test:tester, secret key testing
set -euo pipefail
port=$1
root=$2
export DEBIAN_FRONTEND=noninteractive
if ! command -v swift-proxy-server >/dev/null; then
  (apt-get update -qq && apt-get install -y -qq --no-install-recommends swift-proxy swift-account swift-container swift-object) >/dev/null 2>&1
fi
mkdir -p "$root/rings" "$root/devices/d1" /etc/swift
# The prefix of hashes is read from this one place.
printf '[swift-hash]\nswift_hash_path_suffix = chaos\nswift_hash_path_prefix = chaos\n[storage-policy:0]\nname = default\ndefault = yes\n' >/etc/swift/swift.conf
cd "$root/rings"
offset=1
for ring in account container object; do
  swift-ring-builder $ring.builder create 4 1 1 >/dev/null
  swift-ring-builder $ring.builder add "r1z1-127.0.0.1:$((port + offset))/d1" 1 >/dev/null
  swift-ring-builder $ring.builder rebalance >/dev/null
  printf '[DEFAULT]\nbind_ip = 127.0.0.1\nbind_port = %d\nuser = root\nworkers = 0\nswift_dir = %s\ndevices = %s\nmount_check = false\nlog_level = WARNING\n[pipeline:main]\npipeline = %s-server\n[app:%s-server]\nuse = egg:swift#%s\n' \
    $((port + offset)) "$root/rings" "$root/devices" $ring $ring $ring >"$root/$ring.conf"
  offset=$((offset + 1))
done
cat >"$root/proxy.conf" <<CONF
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = $port
user = root
workers = 0
swift_dir = $root/rings
log_level = WARNING
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:cache]
use = egg:swift#memcache
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
s3_acl = false
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:copy]
use = egg:swift#copy
[filter:slo]
use = egg:swift#slo
[filter:dlo]
use = egg:swift#dlo
CONF
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 0' TERM INT
for ring in account container object; do
  swift-$ring-server "$root/$ring.conf" >"$root/$ring.log" 2>&1 &
done
swift-proxy-server "$root/proxy.conf" >"$root/proxy.log" 2>&1 &
wait
