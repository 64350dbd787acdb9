"""ssl_vit: self-supervised pre-training of vision backbones on your own images.

From Python: `pretrain`, `distill`, `finetune`, `embed`, `load_backbone`; they load when first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_vit.api import Result, distill, embed, finetune, pretrain
    from ssl_vit.export import load_backbone

__version__ = "0.2.0"
__all__ = ["Result", "distill", "embed", "finetune", "load_backbone", "pretrain"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ssl_vit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("ssl_vit.export" if name == "load_backbone" else "ssl_vit.api"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
