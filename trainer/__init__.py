"""Fine-tune torchvision backbones with Accelerate: frozen trunk, live tail, exact resume.

The public names are listed once, in `__init__.pyi`, and imported when first used: `import trainer`, and with it
`train.py --help`, does not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
