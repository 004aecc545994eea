"""How the blocks of the families compute. In the zoo only this package and `evaluation` import torch.

A block sees a flat batch: the tokens of all requests, of any variant, one below the other. Each
request's own state (its keys and values, its adapters) is behind `context.BlockContext`, which the
engine implements.
"""
