"""How good frozen features are: k-NN, probes, retrieval, segmentation; and features written to files."""
