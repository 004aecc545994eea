"""The block worker: loads blocks once and runs batches of all variants through them.

Rule: this package knows token ids, blocks and chains; it knows nothing of text or of who the callers are.
`engine` decides what a pass computes and `compute` computes it; `blocks` and `kv` own memory; `requests` is
the state of one request. Only `server`, `servicer`, `announcer`, `reconciler` and `peers` deal with other
processes.
"""
