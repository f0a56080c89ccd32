"""Files that survive a kill and a power cut: durable writes, checkpoints, what an archive may hold."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
