from .fast import FastTrunk as FastTrunk
from .features import CachedFeatures as CachedFeatures
from .features import ComputedFeatures as ComputedFeatures
from .features import Features as Features
