"""Clients of servers and zoos. Calls need grpcio and protobuf only; pushing folders needs the zoo."""
