"""How many replicas each chain should have, and what load each brings to a worker."""

from __future__ import annotations

import math

from blockserve.controller.placement.words import PlacementConfig, PlacementProblem
from blockzoo.manifest import ChainId

_WHOLE = 10**12
"""Load of all requests in one link. Loads are integers, so that sums do not depend on their order."""


class Demand:
    """What traffic and wishes ask of a placement.

    Attributes:
        share: of all requests that want the chain.
        order: chains by share, the most wanted first.
        replicas: of each chain.
        keep: most replicas that are not given up.
        load_per_link: that one replica brings for each link it holds.
        fair: load of a worker of speed 1 when all are loaded as their speed says.
    """

    def __init__(self, problem: PlacementProblem, config: PlacementConfig) -> None:
        traffic = {chain: max(problem.traffic.get(chain, 0.0), 0.0) for chain in problem.chains}
        total = sum(traffic[chain] for chain in sorted(traffic))
        even = 1 / max(len(traffic), 1)
        self.share = {chain: rate / total if total else even for chain, rate in traffic.items()}
        self.order = sorted(self.share, key=lambda chain: (-self.share[chain], chain))
        whole = {chain: round(self.share[chain] * _WHOLE) for chain in self.order}
        load = sum(whole[chain] * len(problem.chains[chain]) for chain in self.order)
        speed = sum(max(problem.workers[worker].speed, 1e-9) for worker in sorted(problem.workers))
        self.fair = load / speed if speed else 0.0
        count = max(len(problem.workers), 1)
        per_replica = max(load / count * config.fair_loads_per_replica, 1.0)
        self.replicas: dict[ChainId, int] = {}
        self.keep: dict[ChainId, int] = {}
        least = min(max(config.least_replicas, 1), count)
        most = max(min(config.most_replicas, count), least)
        for chain in self.order:
            wanted = whole[chain] * len(problem.chains[chain]) / per_replica
            self.replicas[chain] = min(max(math.ceil(wanted), least), most)
            self.keep[chain] = min(max(math.ceil(wanted * config.surplus), least), most)
        for chain in problem.wishes.replicas.keys() & self.replicas.keys():
            self.replicas[chain] = self.keep[chain] = max(problem.wishes.replicas[chain], 1)
        self.load_per_link = {chain: whole[chain] // self.replicas[chain] for chain in self.order}
