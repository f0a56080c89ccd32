"""PyTorch Lightning.

Follows https://github.com/Lightning-AI/pytorch-lightning/blob/master/examples/pytorch/domain_templates/
computer_vision_fine_tuning.py: a trunk frozen by `BaseFinetuning.freeze(train_bn=False)`, `LightningModule` with
`torchmetrics`, six data workers, the Trainer's default logger and a checkpoint each epoch.
Unequal: one linear head in place of its four layers; SGD and cosine for Adam and MultiStepLR; no second, unfrozen
stage; the summary and the sanity check are off, as in the example.
"""

import torch
import torch.nn.functional as F
from job import MOMENTUM, arguments, cosine, loaders, network, ready, result
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.finetuning import BaseFinetuning
from torchmetrics import Accuracy

args = arguments(__doc__)


class Classifier(LightningModule):
    def __init__(self, classes: int):
        super().__init__()
        self.net = network(args, classes)
        self.train_acc = Accuracy(task="multiclass", num_classes=classes)
        self.valid_acc = Accuracy(task="multiclass", num_classes=classes)
        if args.frozen and not args.tuned:
            BaseFinetuning.freeze([part for name, part in self.net.named_children() if name != "fc"], train_bn=False)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images)
        self.log("train_acc", self.train_acc(logits, labels), prog_bar=not args.tuned)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images)
        self.valid_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.valid_acc, prog_bar=True)

    def configure_optimizers(self):
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=args.lr, momentum=MOMENTUM)
        schedule = cosine(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self):
        ready()


train, val = loaders(args, workers=6)
trainer = Trainer(
    max_epochs=args.epochs,
    precision="bf16-mixed" if args.bf16 and not args.frozen else "32-true",  # a frozen trunk has its own autocast
    default_root_dir=args.output,
    enable_model_summary=False,
    enable_progress_bar=not args.tuned,
    num_sanity_val_steps=0,
)
trainer.fit(Classifier(len(train.dataset.classes)), train, val)
result(accuracy=float(trainer.callback_metrics["val_acc"]))
