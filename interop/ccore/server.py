"""The greeter on gRPC's C-core. Prints its port, then serves until it is killed."""

import concurrent.futures
import pathlib
import sys

PROTO = pathlib.Path(__file__).resolve().parents[2] / "examples" / "proto"
sys.path.insert(0, str(PROTO))

import grpc  # noqa: E402  (the path above must be set before messages are generated)

messages, services = grpc.protos_and_services("greeter.proto")


class Greeter(services.GreeterServicer):
    def SayHello(self, request, context):
        if request.name == "nobody":
            context.abort(grpc.StatusCode.NOT_FOUND, "nobody is there")
        return messages.HelloReply(message=request.name, backend="ccore")

    def SayHellos(self, request, context):
        for number in range(request.count or 3):
            yield messages.HelloReply(message=f"{request.name} {number}", backend="ccore")

    def Chat(self, requests, context):
        for request in requests:
            yield messages.HelloReply(message=request.name, backend="ccore")


def main():
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=16))
    services.add_GreeterServicer_to_server(Greeter(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
