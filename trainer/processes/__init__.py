"""The processes of a run: start them, agree, notice when one is lost, stop together."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
