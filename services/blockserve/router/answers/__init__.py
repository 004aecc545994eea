"""From sampled tokens to what the caller reads: text, stops, several answers in one stream."""
