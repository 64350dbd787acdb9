"""What only watches: metrics, trackers, profiles."""
