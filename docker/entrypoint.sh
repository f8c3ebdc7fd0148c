#!/bin/sh
# What the image runs: `samloop serve` as the environment says; options are passed on (as --engine mobile_sam), and
# anything else is another command of samloop (as doctor, or weights fetch mobile_sam).
set -eu

fail() {
    echo "samloop: $*" >&2
    exit 2
}

readable() {
    [ -r "$2" ] || fail "uid $(id -u) cannot read $1=$2; on the host: chown $(id -u) FILE && chmod 400 FILE"
}

# A password in a file, for MONAI Label, which wants it in the environment.
if [ -n "${SAMLOOP_DICOMWEB_PASSWORD_FILE:-}" ]; then
    readable SAMLOOP_DICOMWEB_PASSWORD_FILE "$SAMLOOP_DICOMWEB_PASSWORD_FILE"
    MONAI_LABEL_DICOMWEB_PASSWORD=$(cat "$SAMLOOP_DICOMWEB_PASSWORD_FILE")
    export MONAI_LABEL_DICOMWEB_PASSWORD
fi

case ${1-} in
"" | -*) ;;
*) exec samloop "$@" ;;
esac

studies=${SAMLOOP_STUDIES:-/data}
# Here and not by the server, which does not know what is mounted and by whom it can be mended.
if [ -n "${SAMLOOP_TOKEN_FILE:-}" ]; then
    readable SAMLOOP_TOKEN_FILE "$SAMLOOP_TOKEN_FILE"
elif [ -z "${SAMLOOP_TOKEN:-}" ] && [ "${MONAI_LABEL_AUTH_ENABLE:-}" != true ]; then
    [ "${SAMLOOP_OPEN:-}" = 1 ] || fail "no token: whoever reaches the port could read and change every image." \
        "Mount a file with a secret and name it in SAMLOOP_TOKEN_FILE; or set SAMLOOP_OPEN=1 where nobody else" \
        "reaches the port"
    set -- --open "$@"
fi

case $studies in
http://* | https://*) folder=${SAMLOOP_DATA_DIR:-/data} ;;
*) folder=$studies ;;
esac
[ -d "$folder" ] || fail "there is no folder $folder; mount one there"
probe=$folder/.samloop-writable.$$
(: >"$probe") 2>/dev/null || fail "$folder cannot be written by uid $(id -u), it belongs to uid $(stat -c %u "$folder");" \
    "on the host: chown -R $(id -u):$(id -g) FOLDER, or run with --user and a uid that may write there"
rm -f "$probe"

set -- --studies "$studies" --host 0.0.0.0 --port "${SAMLOOP_PORT:-8000}" --log-format "${SAMLOOP_LOG:-json}" "$@"
[ -z "${SAMLOOP_PROJECT:-}" ] || set -- --project "$SAMLOOP_PROJECT" "$@"
# In place of this shell, so that the signal that ends a container reaches the server.
exec samloop serve "$@"
