#!/bin/sh
# The first container of `docker compose up`, which ends at once: makes the passwords that are not there yet. Each folder
# under /secrets is a volume that only its owner mounts, so its files may be read by whatever user the owner runs as.
set -eu
umask 022

new_password() {
    head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1
}

# FILE TEXT: whole or not at all.
put() {
    printf '%s\n' "$2" >"$1.new"
    mv "$1.new" "$1"
}

# FILE: the password that is kept there, made when there is none.
password_in() {
    [ -s "$1" ] || put "$1" "$(new_password)"
    cat "$1"
}

# FILE: the hash of the password there, which is all that Redis knows of it.
hash_of() {
    printf %s "$(password_in "$1")" | sha256sum | cut -d ' ' -f 1
}

service=$(hash_of /secrets/service/redis_password)
put /secrets/service/redis_url "redis://service:$(cat /secrets/service/redis_password)@redis:6379/0"
worker=$(hash_of /secrets/worker/redis_password)
put /secrets/worker/redis_url "redis://worker:$(cat /secrets/worker/redis_password)@redis:6379/0"
# For Redis' own health check, and for whoever administers it.
admin=$(hash_of /secrets/redis/admin_password)
# Written anew each time: the template may come from a new release.
users=$(sed "s/@SERVICE_SHA256@/$service/; s/@WORKER_SHA256@/$worker/; s/@ADMIN_SHA256@/$admin/" /users.acl.template)
put /secrets/redis/users.acl "$users"

password_in /secrets/grafana/password >/dev/null
chmod 777 /secrets/prometheus # its key is made by the service's image, which does not run as root

# With s3.yml only.
if [ -d /secrets/s3 ]; then
    secret=$(password_in /secrets/s3/secret_key)
    credentials=$(printf '[default]\naws_access_key_id = fastlightgen\naws_secret_access_key = %s' "$secret")
    put /secrets/service/s3_credentials "$credentials"
    put /secrets/worker/s3_credentials "$credentials"
    chmod 777 /secrets/s3-data # the store does not run as root either
fi
