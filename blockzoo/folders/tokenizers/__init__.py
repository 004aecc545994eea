"""The files of a tokenizer: what is refused, what is converted, and what serving needs to know of them."""
