"""Looks at a source and a config before a run: images, rates, memory, and what would spoil the run."""
