"""The block worker: loads blocks once and runs batches of all variants through them.

Rule: this package knows token ids, blocks and chains; it knows nothing of text,
gRPC or how callers are told apart. `BlockEngine` is its surface; everything
else is pure logic (`segments`, `scheduler`, `kv`) or owns one resource
(`blocks`, `executor`).
"""
