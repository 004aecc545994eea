"""What can go wrong with a local cluster."""

from __future__ import annotations

from blockzoo.errors import BlockzooError


class LocalClusterError(BlockzooError):
    """A local cluster does not start, runs already, or its files cannot be used."""

    reason = "LOCAL_CLUSTER"
