"""Images: where they come from, how they are decoded, sampled, augmented and loaded."""
