"""Calls the greeter through gRPC's C-core and prints what came back, as one JSON object.

The target is resolved by C-core itself: `xds:///NAME` with GRPC_XDS_BOOTSTRAP or
GRPC_XDS_BOOTSTRAP_CONFIG in the environment, or HOST:PORT for a plain channel.
"""

import argparse
import collections
import json
import pathlib
import sys

PROTO = pathlib.Path(__file__).resolve().parents[2] / "examples" / "proto"
sys.path.insert(0, str(PROTO))

import grpc  # noqa: E402  (the path above must be set before messages are generated)
import grpc.experimental  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--header", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--key-header", metavar="NAME", help="a call for each line of the standard input, with it in this header")
    parser.add_argument("--timeout", type=float, default=10.0, help="of each call, in seconds")
    args = parser.parse_args()

    messages, services = grpc.protos_and_services("greeter.proto")
    metadata = [tuple(header.split("=", 1)) for header in args.header]
    backends_of = {}
    backends, codes, details, callers = (collections.Counter() for _ in range(4))
    # TLS where the control plane says so.
    credentials = grpc.xds_channel_credentials(grpc.experimental.insecure_channel_credentials())
    with grpc.secure_channel(args.target, credentials) as channel:
        greeter = services.GreeterStub(channel)
        if args.key_header:
            for key in sys.stdin.read().split():
                request = messages.HelloRequest(name="C-core")
                reply = greeter.SayHello(request, metadata=[*metadata, (args.key_header, key)], timeout=args.timeout)
                backends_of[key] = reply.backend
            print(json.dumps({"version": grpc.__version__, "backends_of": backends_of}))
            return
        for _ in range(args.requests):
            try:
                request = messages.HelloRequest(name="C-core")
                reply = greeter.SayHello(request, metadata=metadata, timeout=args.timeout)
                backends[reply.backend] += 1
                callers[reply.peer] += 1
                codes["OK"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1
                details[error.details()] += 1
    print(json.dumps({"version": grpc.__version__, "backends": backends, "codes": codes, "details": details, "callers": callers}))


if __name__ == "__main__":
    main()
