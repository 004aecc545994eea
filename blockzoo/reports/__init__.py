"""What a zoo says about its contents, for people and for `--json`. Reads manifests only."""
