"""The zoo over the network: looking into it, caring for it, and registering from another machine."""
