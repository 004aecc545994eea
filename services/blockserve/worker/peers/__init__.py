"""What workers of one path send each other: hidden states, tokens, cached keys and values."""
