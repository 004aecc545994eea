"""The zoo over gRPC, registering from other machines, and the placement of blocks on workers."""
