"""What router, worker and embedded share: errors, the engine seam, settings, statuses."""
