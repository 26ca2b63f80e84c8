"""The greeter on gRPC's C-core. Prints its address, then serves until it is killed.

    server.py              plain text, on a free port
    server.py HOST:PORT    as the control plane of GRPC_XDS_BOOTSTRAP_CONFIG says: mTLS, authorization
"""

import concurrent.futures
import pathlib
import socket
import sys
import time

PROTO = pathlib.Path(__file__).resolve().parents[2] / "examples" / "proto"
sys.path.insert(0, str(PROTO))

import grpc  # noqa: E402  (the path above must be set before messages are generated)

messages, services = grpc.protos_and_services("greeter.proto")


class Greeter(services.GreeterServicer):
    def SayHello(self, request, context):
        if request.name == "nobody":
            context.abort(grpc.StatusCode.NOT_FOUND, "nobody is there")
        caller = b"".join(context.auth_context().get("peer_spiffe_id", [])).decode()
        return messages.HelloReply(message=request.name, backend="ccore", peer=caller)

    def SayHellos(self, request, context):
        for number in range(request.count or 3):
            yield messages.HelloReply(message=f"{request.name} {number}", backend="ccore")

    def Chat(self, requests, context):
        for request in requests:
            yield messages.HelloReply(message=request.name, backend="ccore")


def main():
    xds = len(sys.argv) > 1
    addr = sys.argv[1] if xds else "127.0.0.1:0"
    plain = grpc.insecure_server_credentials()
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=16), xds=xds)
    services.add_GreeterServicer_to_server(Greeter(), server)
    port = server.add_secure_port(addr, grpc.xds_server_credentials(plain) if xds else plain)
    server.start()
    if xds:
        # It listens once the control plane has answered.
        host, port = addr.rsplit(":", 1)
        while True:
            try:
                socket.create_connection((host, int(port))).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    print(addr if xds else f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
