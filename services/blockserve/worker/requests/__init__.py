"""A request while a worker has it: its tokens, what it asks of its logits, where its time goes."""
