"""pytorch-accelerated.

Follows https://github.com/Chris-hughes10/pytorch-accelerated/blob/main/examples/vision/transfer_learning/
pets_finetune.py and pytorch_tutorial_finetune.py beside it: `ModelFreezer(...).freeze(set_modules_as_eval=False)`, the
default callbacks and data workers of its Trainer (one for each CPU of the machine, allowed or not).
Unequal: one linear head; SGD and cosine for Adam and OneCycle; ImageFolder for the pets' file names.
"""

import os

import torch
from job import MOMENTUM, arguments, cores, cosine, image_folders, network, ready, result
from pytorch_accelerated.callbacks import TerminateOnNaNCallback
from pytorch_accelerated.finetuning import ModelFreezer
from pytorch_accelerated.trainer import DEFAULT_CALLBACKS, Trainer

args = arguments(__doc__)
if args.bf16:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` would


class Classifier(Trainer):
    def training_run_start(self):
        ready()

    def create_scheduler(self):
        return cosine(self.optimizer, args.epochs * len(self._train_dataloader))

    def eval_epoch_start(self):
        super().eval_epoch_start()
        self.correct = self.seen = 0

    def calculate_eval_batch_loss(self, batch):
        output = super().calculate_eval_batch_loss(batch)
        self.correct += (self.gather(output["model_outputs"].argmax(1)) == self.gather(batch[1])).sum()
        self.seen += output["batch_size"]
        return output

    def eval_epoch_end(self):
        self.run_history.update_metric("accuracy", self.correct.item() / self.seen)


sets = image_folders(args)
model = network(args, len(sets["train"].classes))
if args.frozen and not args.tuned:
    ModelFreezer(model).freeze(set_modules_as_eval=False)
trainer = Classifier(
    model,
    loss_func=torch.nn.functional.cross_entropy,
    optimizer=torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM),
    callbacks=(TerminateOnNaNCallback,) if args.tuned else DEFAULT_CALLBACKS,
)
options = {"num_workers": cores, "persistent_workers": True} if args.tuned else None
trainer.train(
    train_dataset=sets["train"],
    eval_dataset=sets["val"],
    num_epochs=args.epochs,
    per_device_batch_size=args.batch_size,
    create_scheduler_fn=cosine,
    train_dataloader_kwargs=options,
    eval_dataloader_kwargs=options,
)
result(accuracy=trainer.run_history.get_latest_metric("accuracy"))
