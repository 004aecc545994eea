"""Protocols that callers speak, each translated to `blockserve.router.service` and `operations`."""
