// Command grpcgo is the greeter on grpc-go, as an xDS client and server, and on
// go-spiffe, as a client and server of mTLS with identities of a Workload API.
//
//	grpcgo call [-n N] TARGET            calls and prints what came back, as one JSON object
//	grpcgo call -for D TARGET            calls for so long, each time over a new connection
//	grpcgo serve -addr ADDR              serves as the control plane says; prints each change of its mode, and the
//	                                     serial number of each certificate that it sees for the first time
//	grpcgo spiffe-call -socket S ADDR    calls over mTLS
//	grpcgo spiffe-serve -socket S        serves over mTLS; prints its address
//
// xDS is found by GRPC_XDS_BOOTSTRAP or GRPC_XDS_BOOTSTRAP_CONFIG. Certificates
// are used where xDS says so, and none where it does not.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	xdscreds "google.golang.org/grpc/credentials/xds"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/xds"
	"google.golang.org/protobuf/encoding/protowire"
)

const method = "/helloworld.Greeter/SayHello"

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 {
		log.Fatal("usage: grpcgo call|serve|spiffe-call|spiffe-serve ...")
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	calls := flags.Int("n", 1, "how many calls")
	lasting := flags.Duration("for", 0, "how long to call, each time over a new connection")
	addr := flags.String("addr", "127.0.0.1:0", "where to listen")
	socket := flags.String("socket", "", "the Workload API, as in unix:///run/spiffe.sock")
	if err := flags.Parse(os.Args[2:]); err != nil {
		log.Fatal(err)
	}

	var err error
	switch os.Args[1] {
	case "call":
		err = callXDS(flags.Arg(0), *calls, *lasting)
	case "serve":
		err = serveXDS(*addr)
	case "spiffe-call":
		err = callSPIFFE(*socket, flags.Arg(0), *calls)
	case "spiffe-serve":
		err = serveSPIFFE(*socket, *addr)
	default:
		err = fmt.Errorf("unknown command %q", os.Args[1])
	}
	if err != nil {
		log.Fatal(err)
	}
}

func callXDS(target string, calls int, lasting time.Duration) error {
	creds, err := xdscreds.NewClientCredentials(xdscreds.ClientOptions{FallbackCreds: insecure.NewCredentials()})
	if err != nil {
		return err
	}
	return call(target, creds, calls, lasting)
}

func callSPIFFE(socket, addr string, calls int) error {
	source, err := identities(socket)
	if err != nil {
		return err
	}
	defer source.Close()
	config := tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeAny())
	return call("passthrough:///"+addr, credentials.NewTLS(config), calls, 0)
}

// pause is between calls that each have a connection of their own.
const pause = 20 * time.Millisecond

// call makes calls one after another: so many over one channel, or for so long
// over a channel for each. The first channel stays open, and with it what xDS
// and the files of certificates said.
func call(target string, creds credentials.TransportCredentials, calls int, lasting time.Duration) error {
	open := func() (*grpc.ClientConn, error) {
		return grpc.NewClient(target, grpc.WithTransportCredentials(creds))
	}
	channel, err := open()
	if err != nil {
		return err
	}
	defer channel.Close()

	backends, codes, details := map[string]int{}, map[string]int{}, map[string]int{}
	callers, servers, certificates := map[string]int{}, map[string]int{}, map[string]int{}
	one := func(channel *grpc.ClientConn) {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		var server peer.Peer
		reply := message{}
		err := channel.Invoke(ctx, method, &message{name: "grpc-go"}, &reply, grpc.ForceCodecV2(codec{}), grpc.Peer(&server))
		codes[name(err)]++
		if err != nil {
			details[status.Convert(err).Message()]++
			return
		}
		backends[reply.backend]++
		callers[reply.peer]++
		uri, serial := identity(&server)
		servers[uri]++
		certificates[serial]++
	}
	if lasting == 0 {
		for range calls {
			one(channel)
		}
	} else {
		one(channel)
	}
	for end := time.Now().Add(lasting); time.Now().Before(end); time.Sleep(pause) {
		fresh, err := open()
		if err != nil {
			return err
		}
		one(fresh)
		fresh.Close()
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"version": grpc.Version, "backends": backends, "codes": codes, "details": details,
		"callers": callers, "servers": servers, "certificates": certificates,
	})
}

func serveXDS(addr string) error {
	creds, err := xdscreds.NewServerCredentials(xdscreds.ServerOptions{FallbackCreds: insecure.NewCredentials()})
	if err != nil {
		return err
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	mode := xds.ServingModeCallback(func(_ net.Addr, args xds.ServingModeChangeArgs) {
		if args.Mode == connectivity.ServingModeServing {
			fmt.Println(listener.Addr())
		} else {
			fmt.Println("not serving:", args.Err)
		}
	})
	server, err := xds.NewGRPCServer(grpc.Creds(creds), grpc.ForceServerCodecV2(codec{}), mode)
	if err != nil {
		return err
	}
	server.RegisterService(&service, nil)
	return server.Serve(listener)
}

func serveSPIFFE(socket, addr string) error {
	source, err := identities(socket)
	if err != nil {
		return err
	}
	defer source.Close()
	config := tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny())
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)), grpc.ForceServerCodecV2(codec{}))
	server.RegisterService(&service, nil)
	return server.Serve(listener)
}

// identities waits for the first certificate of the Workload API.
func identities(socket string) (*workloadapi.X509Source, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(socket)))
}

// seen has the serial numbers of the certificates of callers.
var seen sync.Map

var service = grpc.ServiceDesc{
	ServiceName: "helloworld.Greeter",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{
		MethodName: "SayHello",
		Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			request := message{}
			if err := decode(&request); err != nil {
				return nil, err
			}
			caller, _ := peer.FromContext(ctx)
			uri, serial := identity(caller)
			if _, known := seen.LoadOrStore(serial, true); !known {
				fmt.Println("certificate", serial)
			}
			return &message{name: "Hello " + request.name, backend: "grpc-go", peer: uri}, nil
		},
	}},
}

// identity is the URI in the verified certificate of the other side, and the
// serial number of that; both are empty without one.
func identity(other *peer.Peer) (uri, serial string) {
	if other == nil {
		return "", ""
	}
	if info, ok := other.AuthInfo.(credentials.TLSInfo); ok && len(info.State.PeerCertificates) > 0 {
		certificate := info.State.PeerCertificates[0]
		if len(certificate.URIs) == 1 {
			uri = certificate.URIs[0].String()
		}
		serial = certificate.SerialNumber.String()
	}
	return uri, serial
}

// name is the status by its name in the protocol, as C-core prints it.
func name(err error) string {
	names := map[string]string{"OK": "OK", "Unavailable": "UNAVAILABLE", "PermissionDenied": "PERMISSION_DENIED", "DeadlineExceeded": "DEADLINE_EXCEEDED"}
	code := status.Code(err).String()
	if known, ok := names[code]; ok {
		return known
	}
	return code
}

// message has the fields of examples/proto/greeter.proto that are used here, of requests and replies alike.
type message struct{ name, backend, peer string }

// codec writes and reads message, so that nothing has to be generated.
type codec struct{}

var _ encoding.CodecV2 = codec{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(value any) (mem.BufferSlice, error) {
	m := value.(*message)
	var out []byte
	for number, text := range map[protowire.Number]string{1: m.name, 2: m.backend, 4: m.peer} {
		if text != "" {
			out = protowire.AppendTag(out, number, protowire.BytesType)
			out = protowire.AppendString(out, text)
		}
	}
	return mem.BufferSlice{mem.SliceBuffer(out)}, nil
}

func (codec) Unmarshal(data mem.BufferSlice, value any) error {
	m, in := value.(*message), data.Materialize()
	for len(in) > 0 {
		number, kind, size := protowire.ConsumeTag(in)
		if size < 0 {
			return errors.New("malformed message")
		}
		in = in[size:]
		size = protowire.ConsumeFieldValue(number, kind, in)
		if size < 0 {
			return errors.New("malformed field")
		}
		if kind == protowire.BytesType {
			text, _ := protowire.ConsumeString(in)
			switch number {
			case 1:
				m.name = text
			case 2:
				m.backend = text
			case 4:
				m.peer = text
			}
		}
		in = in[size:]
	}
	return nil
}
