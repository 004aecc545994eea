"""What the processes and their clients share.

Layers, the upper first; a package imports only from those below it:

- `process`: running one until it is told to stop
- `metrics`: what a process counts
- `rpc` (gRPC servers, channels), `state` (what processes share), `placement` (operators' wishes), `tracing`
- `wire` (messages to values and back), `settings` (the base of every service's settings)
- `api`: the values
- `errors`
"""
