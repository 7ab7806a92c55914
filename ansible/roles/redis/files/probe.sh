#!/bin/sh
# Prove that Redis lets users in: probe ADDRESS PORT, their names and passwords on standard input.
while read -r user REDISCLI_AUTH; do
    export REDISCLI_AUTH
    said=$(redis-cli -e -h "$1" -p "$2" --user "$user" PING 2>&1 </dev/null) || {
        echo "Redis on $1:$2 does not let $user in: $said" >&2
        exit 1
    }
done
