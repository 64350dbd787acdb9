"""Where images come from."""

from ssl_vit.data.sources.source import Source, open_source

__all__ = ["Source", "open_source"]
