"""The model: build a classifier, load weights into it, freeze it, cut it into trunk and tail."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
