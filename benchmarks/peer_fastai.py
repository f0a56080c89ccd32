"""fastai.

Follows https://docs.fast.ai/tutorial.vision.html: `ImageDataLoaders.from_folder`, and `vision_learner`, whose body is
frozen but for its BatchNorm layers: they train (`train_bn=True`), so autograd runs through the whole body.
Tuned: the trunk in eval mode, without autograd; the job's bf16 autocast, as its own switch is for CUDA alone.
Unequal: a pooling and a linear layer for its larger head; SGD and cosine for Adam and 1cycle; the job's resize and crop
for its `Resize(224)`, no batch augmentation; the last, smaller batch of an epoch is used (`drop_last=False`).
"""

from contextlib import nullcontext
from functools import partial

from fastai.vision import all as fa
from job import MOMENTUM, arguments, cores, geometry, network, ready, result
from torch import Tensor, nn
from torchvision.transforms import Compose

args = arguments(__doc__)


class Shape(fa.RandTransform):
    """The job's resize and crop."""

    split_idx, order = None, 1
    chains = tuple(Compose(geometry(args)[part]) for part in ("train", "val"))

    def before_call(self, images, split_idx):
        self.part = split_idx or 0

    def encodes(self, image: fa.PILImage):
        return fa.PILImage(self.chains[self.part](image))


class PlainTensors(nn.Module):
    """Without fastai's tensor subclass, which torch.compile and autocast do not expect."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.as_subclass(Tensor))


tuned = {"num_workers": cores, "persistent_workers": True} if args.tuned else {}
dls = fa.ImageDataLoaders.from_folder(
    args.data,
    valid="val",
    item_tfms=Shape(),
    batch_tfms=fa.Normalize.from_stats(args.mean, args.std),
    bs=args.batch_size,
    drop_last=False,
    device=args.device,
    **tuned,
)
net = network(args, dls.c)
options = {"opt_func": partial(fa.SGD, mom=MOMENTUM), "wd": 0.0, "metrics": fa.accuracy, "path": args.output}
if args.tuned:
    learner = fa.Learner(dls, PlainTensors(net), **options)
else:
    net.requires_grad_(True)  # the learner freezes it
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.fc)
    learner = fa.vision_learner(dls, lambda pretrained: net, custom_head=pool, **options)
    if not args.frozen:
        learner.unfreeze()
ready()
with learner.no_bar() if args.tuned else nullcontext():
    learner.fit(args.epochs, args.lr, cbs=fa.ParamScheduler({"lr": fa.SchedCos(args.lr, 0)}))
result(accuracy=float(learner.recorder.values[-1][-1]))
