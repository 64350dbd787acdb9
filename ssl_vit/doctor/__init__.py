"""What can be told before a run: about its pictures, its rate, its memory, and what would spoil it."""
