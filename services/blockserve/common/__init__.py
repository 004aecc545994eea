"""What all services share: values (`api`), messages (`wire`), gRPC (`rpc`), shared state, metrics, processes."""
