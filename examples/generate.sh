#!/usr/bin/env bash
# An image and a sentence in, an MP4 out, with curl alone:
#   examples/generate.sh models/examples/red-circle.png "a red circle moves right quickly, static camera"
set -euo pipefail

image=${1:?usage: $0 IMAGE PROMPT} prompt=${2:?usage: $0 IMAGE PROMPT}
url=${FASTLIGHTGEN_URL:-http://127.0.0.1:8000}
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT

# Into a file, and again after the time that Retry-After says. The key goes in by stdin: arguments are for all to see.
ask() {
  curl -sS --fail-with-body --retry 5 --retry-connrefused --output "$answer" --config - "$@" \
    <<<"${FASTLIGHTGEN_KEY:+header = \"Authorization: Bearer $FASTLIGHTGEN_KEY\"}" || { cat "$answer" >&2; exit 1; }
}

field() { # of the answer, if it is a text
  sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" "$answer"
}

# The same Idempotency-Key with each try: however often it arrives, it is one job.
ask "$url/generate" \
  -H "Idempotency-Key: $(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" \
  -H "Prefer: wait=60" \
  -F "image=@\"$image\"" \
  --form-string "prompt=$prompt"

while [[ $(field status) =~ ^(queued|running|cancelling)$ ]]; do
  sleep 1
  ask "$url/generate/$(field id)"
done
[[ $(field status) == succeeded ]] || { cat "$answer" >&2; exit 1; }

# The link needs no key. It may lead on to an object store.
curl -sS --fail --location --retry 5 --output "$(field id).mp4" "$(field video_url)"
echo "$PWD/$(field id).mp4"
