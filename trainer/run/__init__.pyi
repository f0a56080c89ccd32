from .folder import Run as Run
from .outcome import training as training
from .resume import open_run as open_run
