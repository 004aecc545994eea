"""Equivalence records and decisions as JSON, and back with every field checked.

As in manifests, numbers with fractions are strings, and members that this version does not
know are left alone.
"""

from __future__ import annotations

import math

from blockzoo.digest import is_digest
from blockzoo.equivalence.records import Action, Decision, EquivalenceRecord, Positions, RecordId, Side
from blockzoo.errors import CorruptManifestError
from blockzoo.manifest import BlobId, BlockId, ChainId, JsonValue, Link


def record_to_json(record: EquivalenceRecord) -> dict[str, JsonValue]:
    """Return the JSON whose digest is the record's id."""
    return {
        "original": _side_to_json(record.original),
        "substitute": _side_to_json(record.substitute),
        "result": str(record.result),
        "mean_kl": repr(record.mean_kl),
        "worst_kl": repr(record.worst_kl),
        "top1_agreement": repr(record.top1_agreement),
        "weight_distance": _optional(record.weight_distance),
        "num_tokens": record.num_tokens,
        "window_tokens": record.window_tokens,
        "text_digest": record.text_digest,
        "text_bytes": record.text_bytes,
        "tokenizer": str(record.tokenizer),
        "dtype": record.dtype,
        "created_at": record.created_at,
        "blockzoo_version": record.blockzoo_version,
    }


def record_from_json(value: JsonValue, record_id: RecordId) -> EquivalenceRecord:
    """Read a record; raises CorruptManifestError."""
    fields = _Fields(value)
    agreement = fields.number("top1_agreement")
    _require(agreement <= 1, "top1_agreement is above 1")
    record = EquivalenceRecord(
        original=_side_from_json(fields.object("original")),
        substitute=_side_from_json(fields.object("substitute")),
        result=ChainId(fields.digest("result")),
        mean_kl=fields.number("mean_kl"),
        worst_kl=fields.number("worst_kl"),
        top1_agreement=agreement,
        weight_distance=fields.optional_number("weight_distance"),
        num_tokens=fields.count("num_tokens"),
        window_tokens=fields.count("window_tokens"),
        text_digest=fields.digest("text_digest"),
        text_bytes=fields.count("text_bytes"),
        tokenizer=BlobId(fields.digest("tokenizer")),
        dtype=fields.text("dtype"),
        created_at=fields.text("created_at"),
        blockzoo_version=fields.text("blockzoo_version"),
        id=record_id,
    )
    same_length = len(record.original.links) == len(record.substitute.links)
    _require(same_length, "the two runs have different lengths")
    return record


def decision_to_json(decision: Decision) -> dict[str, JsonValue]:
    """Return the decision as JSON."""
    return {
        "record": str(decision.record),
        "number": decision.number,
        "action": decision.action.value,
        "variants": [*decision.variants],
        "by": decision.by,
        "reason": decision.reason,
        "at": decision.at,
        "max_kl": _optional(decision.max_kl),
        "min_agreement": _optional(decision.min_agreement),
        "forced": decision.forced,
    }


def decision_from_json(value: JsonValue) -> Decision:
    """Read a decision; raises CorruptManifestError."""
    fields = _Fields(value)
    action = fields.text("action")
    _require(action in tuple(Action), f"action {action[:40]!r} is unknown")
    return Decision(
        record=RecordId(fields.digest("record")),
        number=fields.count("number"),
        action=Action(action),
        variants=tuple(_text(item, "variants") for item in fields.list("variants")),
        by=fields.text("by"),
        reason=fields.text("reason"),
        at=fields.text("at"),
        max_kl=fields.optional_number("max_kl"),
        min_agreement=fields.optional_number("min_agreement"),
        forced=fields.flag("forced"),
    )


def _side_to_json(side: Side) -> JsonValue:
    return {
        "variant": side.variant,
        "chain": str(side.chain),
        "first": side.positions.first,
        "end": side.positions.end,
        "links": [
            {"base": str(link.base), "applied": [str(item) for item in link.applied]} for link in side.links
        ],
    }


def _side_from_json(fields: _Fields) -> Side:
    positions = Positions(fields.count("first"), fields.count("end"))
    links = tuple(_link_from_json(_Fields(item)) for item in fields.list("links"))
    _require(bool(links) and positions.end - positions.first == len(links), "positions and links disagree")
    return Side(fields.text("variant"), ChainId(fields.digest("chain")), positions, links)


def _link_from_json(fields: _Fields) -> Link:
    applied = tuple(BlockId(_digest(item, "applied")) for item in fields.list("applied"))
    return Link(BlockId(fields.digest("base")), applied)


class _Fields:
    """Members of a JSON object, each checked when it is taken."""

    def __init__(self, value: JsonValue) -> None:
        if not isinstance(value, dict):
            raise _unreadable("it is not an object")
        self._values = value

    def object(self, name: str) -> _Fields:
        return _Fields(self._values.get(name))

    def list(self, name: str) -> list[JsonValue]:
        value = self._values.get(name)
        if not isinstance(value, list):
            raise _unreadable(f"{name} is not a list")
        return value

    def text(self, name: str) -> str:
        return _text(self._values.get(name), name)

    def digest(self, name: str) -> str:
        return _digest(self._values.get(name), name)

    def count(self, name: str) -> int:
        value = self._values.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _unreadable(f"{name} is not a count")
        return value

    def flag(self, name: str) -> bool:
        value = self._values.get(name)
        if not isinstance(value, bool):
            raise _unreadable(f"{name} is not true or false")
        return value

    def number(self, name: str) -> float:
        """A finite number that is not negative."""
        try:
            number = float(self.text(name))
        except ValueError:
            number = math.nan
        _require(math.isfinite(number) and number >= 0, f"{name} is not a number of at least 0")
        return number

    def optional_number(self, name: str) -> float | None:
        return None if self._values.get(name) is None else self.number(name)


def _optional(number: float | None) -> str | None:
    return None if number is None else repr(number)


def _text(value: JsonValue, what: str) -> str:
    # Printable, because all of it is shown in terminals.
    if not isinstance(value, str) or not value.isprintable():
        raise _unreadable(f"{what} is not a line of text")
    return value


def _digest(value: JsonValue, what: str) -> str:
    text = _text(value, what)
    _require(is_digest(text), f"{what} is not a digest")
    return text


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise _unreadable(problem)


def _unreadable(problem: str) -> CorruptManifestError:
    return CorruptManifestError(f"equivalence record or decision cannot be read: {problem}")
