// Command istiod runs Istio's control plane for tests: the real discovery
// server on a folder of Istio YAML, with an in-memory Kubernetes client where
// the real one would need a cluster.
package main

import (
	"flag"
	"log"
	"os"
	"os/signal"
	"reflect"
	"syscall"
	"time"
	"unsafe"

	"istio.io/istio/pilot/pkg/bootstrap"
	"istio.io/istio/pkg/kube"
)

func main() {
	config := flag.String("config", "", "folder of Istio YAML, read at start and watched")
	mesh := flag.String("mesh", "", "mesh config file; may be missing")
	http := flag.String("http", "127.0.0.1:15080", "address of /ready and /debug")
	plain := flag.String("grpc", "127.0.0.1:15010", "address of xDS in plain text")
	secure := flag.String("tls", "127.0.0.1:15012", "address of xDS and the CA over TLS")
	flag.Parse()

	args := bootstrap.NewPilotArgs(func(p *bootstrap.PilotArgs) {
		p.RegistryOptions.FileDir = *config
		p.MeshConfigFile = *mesh
		p.ShutdownDuration = time.Second
		p.RegistryOptions.KubeOptions.DomainSuffix = "cluster.local"
		p.RegistryOptions.KubeOptions.ClusterID = "Kubernetes"
		p.ServerOptions = bootstrap.DiscoveryServerOptions{
			HTTPAddr:       *http,
			MonitoringAddr: "127.0.0.1:0",
			GRPCAddr:       *plain,
			SecureGRPCAddr: *secure,
		}
	})

	// The options run before the server makes its Kubernetes client, and it makes none when it has one.
	server, err := bootstrap.NewServer(args, func(s *bootstrap.Server) {
		field := reflect.ValueOf(s).Elem().FieldByName("kubeClient")
		reflect.NewAt(field.Type(), unsafe.Pointer(field.UnsafeAddr())).Elem().Set(reflect.ValueOf(kube.NewFakeClient()))
	})
	if err != nil {
		log.Fatalf("istiod: make the server: %v", err)
	}

	stop := make(chan struct{})
	if err := server.Start(stop); err != nil {
		log.Fatalf("istiod: start: %v", err)
	}

	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	<-signals
	close(stop)
	server.WaitUntilCompletion()
}
