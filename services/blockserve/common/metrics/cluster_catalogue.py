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
    "Workers with a live lease, by state: `ready`, `draining`.",
)
VIEW_AGE = Metric(
    "blockzoo_view_age_seconds",
    "gauge",
    (),
    "Time since the shared state was last read; it grows while the shared state cannot be reached.",
)
PLACEMENT_VERSION = Metric(
    "blockzoo_placement_version", "gauge", (), "Version of the placement in the shared state, as last read."
)

FAILOVERS = Metric(
    "blockzoo_failovers_total",
    "counter",
    (),
    "Times that a request left a broken path to continue on another one.",
)
KV_DECISIONS = Metric(
    "blockzoo_kv_decisions_total",
    "counter",
    ("what", "reason"),
    "Decisions on keys and values of requests that changed workers: `transfer` or `recompute`, by reason.",
)
KV_BANDWIDTH = Metric(
    "blockzoo_kv_transfer_bytes_per_second",
    "gauge",
    (),
    "Speed at which workers send keys and values to each other, a moving mean; 0 before the first transfer.",
)
PATH_WORKERS = Metric(
    "blockzoo_path_workers",
    "histogram",
    (),
    "Number of workers on a path; a request that continues on another path counts again.",
)

HOP_SECONDS = Metric(
    "blockzoo_hop_seconds",
    "gauge",
    _PEER,
    "One-way latency to another worker, a moving mean; of several workers that share the label, the longest.",
)
IN_FLIGHT_BYTES = Metric(
    "blockzoo_link_in_flight_bytes",
    "gauge",
    _PEER,
    "Bytes of hidden states that were sent to another worker and wait there.",
)
WINDOW_FULL = Metric(
    "blockzoo_link_window_full_total",
    "counter",
    _PEER,
    "Times that a pass left out a request because a full window of hidden states waits at the next worker.",
)
FOLLOWED = Metric(
    "blockzoo_requests_begun_elsewhere",
    "gauge",
    (),
    "Requests that began at another worker and that this worker executes a part of.",
)
LEASE_KNOWN = Metric(
    "blockzoo_lease_known",
    "gauge",
    (),
    "1 while the shared state can be reached and holds the worker's lease, else 0.",
)
LEASE_AGE = Metric(
    "blockzoo_lease_age_seconds", "gauge", (), "Time since the worker's lease was last renewed."
)

LEADING = Metric("blockzoo_controller_leading", "gauge", (), "1 if this controller leads, else 0.")
PLANNING_SECONDS = Metric(
    "blockzoo_placement_planning_seconds", "gauge", (), "Time to plan the last placement; 0 before the first."
)
PLACEMENTS = Metric(
    "blockzoo_placements_total", "counter", (), "Placements that this controller has written."
)
PLACEMENT_LOADS = Metric(
    "blockzoo_placement_loads_total",
    "counter",
    (),
    "Runs of chains that these placements assigned to a worker that did not have them.",
)
PLACEMENT_UNLOADS = Metric(
    "blockzoo_placement_unloads_total",
    "counter",
    (),
    "Runs of chains that these placements removed from a live worker.",
)
PLACEMENT_BYTES = Metric(
    "blockzoo_placement_moved_bytes_total",
    "counter",
    (),
    "Bytes of blocks that workers have to load for these placements.",
)
PLACEMENT_REFUSED = Metric(
    "blockzoo_placement_refused_writes_total",
    "counter",
    (),
    "Writes that the shared state refused because another controller had become the leader.",
)
LEFT_OUT = Metric(
    "blockzoo_placement_left_out_chains", "gauge", (), "Chains for which the last placement found no room."
)

_STATE = (WORKERS, VIEW_AGE, PLACEMENT_VERSION)
ROUTER = (*_STATE, FAILOVERS, KV_DECISIONS, KV_BANDWIDTH, PATH_WORKERS)
"""What a router shows in addition to its requests."""
WORKER = (HOP_SECONDS, IN_FLIGHT_BYTES, WINDOW_FULL, FOLLOWED, LEASE_KNOWN, LEASE_AGE)
"""What a worker shows in addition to its engine."""
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
