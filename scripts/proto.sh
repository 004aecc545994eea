#!/usr/bin/env bash
# Generates the stubs under proto/ and holds them to their promises.
#   scripts/proto.sh generate   write the stubs
#   scripts/proto.sh check      fail if the stubs are not what generating gives, or the floor runtime refuses them
#   scripts/proto.sh lint       buf lint, and buf breaking against proto/baseline.binpb
#   scripts/proto.sh baseline   make the present messages the ones later versions must stay compatible with (once per release)
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONSAFEPATH=1
venv=.cache/proto-venv
buf=${VENV:-.venv}/bin/buf

environment() {
    local stamp=$venv/.stamp want
    want=$(sha256sum proto/requirements.txt)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi
    echo "proto: setting up the generator in $venv" >&2
    mkdir -p .cache
    rm -rf "$venv"
    "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r proto/requirements.txt 2>.cache/proto-pip.log \
        || { grep -v '^WARNING' .cache/proto-pip.log >&2; exit 1; }
    echo "$want" >"$stamp"
}

generate_into() {
    PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m grpc_tools.protoc -I proto \
        --python_out="$1" --mypy_out=quiet:"$1" --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1" proto/blockproto/v1/*.proto
}

case "${1:-}" in
generate)
    environment
    generate_into proto
    ;;
check)
    environment
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate_into "$fresh"
    status=0
    for file in proto/blockproto/v1/*_pb2*.py*; do
        diff -q "$file" "$fresh/${file#proto/}" >/dev/null 2>&1 || { echo "proto: $file is stale; run \`make proto\`" >&2; status=1; }
    done
    for file in "$fresh"/blockproto/v1/*; do
        [ -e "proto/${file#"$fresh"/}" ] || { echo "proto: ${file#"$fresh"/} is missing; run \`make proto\`" >&2; status=1; }
    done
    PYTHONPATH=proto "$venv/bin/python" -W ignore -c 'import blockproto.v1.admin_pb2_grpc, blockproto.v1.inference_pb2_grpc, blockproto.v1.placement_pb2_grpc, blockproto.v1.zoo_pb2_grpc'
    exit $status
    ;;
lint)
    buf=$(realpath "$buf")
    cd proto
    "$buf" lint
    "$buf" breaking --against baseline.binpb
    ;;
baseline)
    buf=$(realpath "$buf")
    cd proto
    "$buf" build --as-file-descriptor-set --exclude-source-info -o baseline.binpb
    ;;
*)
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
