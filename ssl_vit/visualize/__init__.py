"""Figures, films and reports of what was learned."""
