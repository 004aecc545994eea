"""The edge: text in, token requests to the engine, text out.

Rule: this package runs without torch and never imports the worker; it knows the engine as
`blockserve.common.api.engine.Engine` and the zoo as `intake.catalog.ZooReader`. Fronts translate what callers
speak; protobuf messages are known to them, to the server and to `cluster`, which speaks with workers.
"""
