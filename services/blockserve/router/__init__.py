"""The edge: text in, token requests to the engine, text out.

Rule: this package runs without torch and never imports the worker; it knows the
engine as `blockserve.common.api.engine.Engine` and the zoo as `resolve.ZooReader`.
Protobuf messages stop at `servicer`, `client` and `convert`; the rest is pure logic.
"""
