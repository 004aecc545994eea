"""The engine: which requests the next pass computes, the passes themselves, and who hears of the results."""
