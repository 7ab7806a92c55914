#!/bin/sh
# Prove that PostgreSQL lets logins in: probe ADDRESS PORT, their databases, names and passwords on standard input.
while read -r database login PGPASSWORD; do
    export PGPASSWORD
    psql --no-psqlrc --quiet --command='' "host=$1 port=$2 dbname=$database user=$login" </dev/null || exit
done
