"""One process that serves a zoo: engine, router, health and reflection on one gRPC server.

Rule: the only package that composes services; it holds no logic of its own beyond starting, watching and
stopping.
"""
