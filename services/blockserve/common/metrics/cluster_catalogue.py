"""Metrics of the processes of a cluster, beside those of requests and engines in `catalogue`."""

from __future__ import annotations

from blockserve.common.metrics.catalogue import Metric

PATH_BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
"""Borders of path lengths, in workers."""

_PEER = ("peer",)

WORKERS = Metric(
    "blockzoo_workers",
    "gauge",
    ("state",),
    "Workers with a live lease, by what they say: `ready`, `draining`.",
)
VIEW_AGE = Metric(
    "blockzoo_view_age_seconds",
    "gauge",
    (),
    "Since the shared state was last read; it grows while the state cannot be reached.",
)
PLACEMENT_VERSION = Metric(
    "blockzoo_placement_version", "gauge", (), "Version of the placement in the shared state, as last read."
)

FAILOVERS = Metric(
    "blockzoo_failovers_total", "counter", (), "Times a request left a path that broke, to go on elsewhere."
)
KV_DECISIONS = Metric(
    "blockzoo_kv_decisions_total",
    "counter",
    ("what", "reason"),
    "What became of keys and values of requests that changed workers: `transfer` or `recompute`, and why.",
)
KV_BANDWIDTH = Metric(
    "blockzoo_kv_transfer_bytes_per_second",
    "gauge",
    (),
    "Speed at which one worker sends keys and values to another, a moving mean; 0 before the first.",
)
PATH_WORKERS = Metric(
    "blockzoo_path_workers",
    "histogram",
    (),
    "Workers on a path that a request was given; a request that goes on elsewhere is given another.",
)

HOP_SECONDS = Metric(
    "blockzoo_hop_seconds",
    "gauge",
    _PEER,
    "One way to another worker, a moving mean; of several that share the label, the longest.",
)
IN_FLIGHT_BYTES = Metric(
    "blockzoo_link_in_flight_bytes",
    "gauge",
    _PEER,
    "Hidden states that were sent to another worker and wait there.",
)
WINDOW_FULL = Metric(
    "blockzoo_link_window_full_total",
    "counter",
    _PEER,
    "Times a pass left a request out because a whole window of hidden states waits at the next worker.",
)
FOLLOWED = Metric(
    "blockzoo_requests_begun_elsewhere",
    "gauge",
    (),
    "Requests that another worker began and this one executes a part of.",
)
LEASE_KNOWN = Metric(
    "blockzoo_lease_known",
    "gauge",
    (),
    "1 while the shared state can be reached and has the worker's lease, else 0.",
)
LEASE_AGE = Metric(
    "blockzoo_lease_age_seconds", "gauge", (), "Since the shared state last took the worker's lease."
)

LEADING = Metric("blockzoo_controller_leading", "gauge", (), "1 at the controller that leads, else 0.")
PLANNING_SECONDS = Metric(
    "blockzoo_placement_planning_seconds", "gauge", (), "How long the last placement took to plan; 0 before."
)
PLACEMENTS = Metric("blockzoo_placements_total", "counter", (), "Placements that this controller wrote.")
PLACEMENT_LOADS = Metric(
    "blockzoo_placement_loads_total", "counter", (), "Runs of chains that these gave to a worker anew."
)
PLACEMENT_UNLOADS = Metric(
    "blockzoo_placement_unloads_total",
    "counter",
    (),
    "Runs of chains that these took from a worker that lives.",
)
PLACEMENT_BYTES = Metric(
    "blockzoo_placement_moved_bytes_total",
    "counter",
    (),
    "Bytes of blocks that workers have to load for these.",
)
PLACEMENT_REFUSED = Metric(
    "blockzoo_placement_refused_writes_total",
    "counter",
    (),
    "Writes that the shared state refused because another controller leads by now.",
)
LEFT_OUT = Metric(
    "blockzoo_placement_left_out_chains", "gauge", (), "Chains that the last placement found no room for."
)

_STATE = (WORKERS, VIEW_AGE, PLACEMENT_VERSION)
ROUTER = (*_STATE, FAILOVERS, KV_DECISIONS, KV_BANDWIDTH, PATH_WORKERS)
"""What a router shows beside its requests."""
WORKER = (HOP_SECONDS, IN_FLIGHT_BYTES, WINDOW_FULL, FOLLOWED, LEASE_KNOWN, LEASE_AGE)
"""What a worker shows beside its engine."""
CONTROLLER = (
    *_STATE,
    LEADING,
    PLANNING_SECONDS,
    PLACEMENTS,
    PLACEMENT_LOADS,
    PLACEMENT_UNLOADS,
    PLACEMENT_BYTES,
    PLACEMENT_REFUSED,
    LEFT_OUT,
)
"""What a controller shows."""
