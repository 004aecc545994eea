"""From a call to an engine request: checks, the variant and its files, template, tokens, loading."""
