"""Messages of `blockproto.v1` to the values of `common.api` and back. Pure."""
