"""Speed and memory of the device."""
