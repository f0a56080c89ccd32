"""Images: where they come from, how they are decoded, in which order and under which random keys they are used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
