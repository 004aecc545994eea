#!/usr/bin/env bash
# grpc.aio: a client that still writes when the server refuses a call gets INTERNAL in place of the server's status.
# Exit status: 0 the behaviour is as described, 1 it has changed, 2 the packages could not be installed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv >&2 || exit 2
venv/bin/python -m pip install --quiet --disable-pip-version-check grpcio==1.85.1 >&2 || exit 2

cat >refused.py <<'EOF'
import asyncio
import collections

import grpc

METHOD = "/test.Test/Talk"
CALLS, MESSAGES, SIZE = 100, 64, 1 << 16


def same(data):
    return data


async def refuse(_requests, context):
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "refused")
    yield b""


async def main():
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(refuse, same, same)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Talk": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    seen = {"write": collections.Counter(), "read": collections.Counter()}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for how, codes in seen.items():
            for _ in range(CALLS):
                call = channel.stream_stream(METHOD, same, same)()
                try:
                    for _ in range(MESSAGES if how == "write" else 0):
                        await call.write(bytes(SIZE))
                    await call.read()
                except grpc.aio.AioRpcError:
                    pass
                codes[(await call.code()).name] += 1
            print(f"{how}: {dict(codes)}")
    await server.stop(None)
    writing, reading = seen.values()
    assert set(reading) == {"FAILED_PRECONDITION"}, reading
    assert writing["INTERNAL"] > 0, writing


print("grpcio", grpc.__version__)
asyncio.run(main())
EOF
venv/bin/python refused.py || exit 1
