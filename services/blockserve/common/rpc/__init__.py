"""gRPC servers and channels: addresses, TLS and credentials, interceptors, health."""
