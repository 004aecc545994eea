"""One pass over the loaded blocks: batches by segment, adapters on them, sampling at the end."""
