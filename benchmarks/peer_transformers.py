"""Hugging Face Trainer, image classification.

Follows https://github.com/huggingface/transformers/blob/main/examples/pytorch/image-classification/
run_image_classification.py and the command of its README: `collate_fn`, `compute_metrics`, evaluation and checkpoint
each epoch, no data workers by default. It has no switch to freeze; frozen here as in the tutorial, in train mode.
Unequal: ImageFolder in place of `datasets`; the ResNet is timm's, in transformers' wrapper, so that the weights fit;
SGD with momentum and cosine for AdamW and linear; no report to trackers.
"""

import torch
from job import MOMENTUM, Tuned, arguments, cores, image_folders, ready, result, state
from transformers import AutoModelForImageClassification, TimmWrapperConfig, Trainer, TrainerCallback, TrainingArguments

args = arguments(__doc__)


def collate_fn(examples):
    pixel_values = torch.stack([image for image, _ in examples])
    return {"pixel_values": pixel_values, "labels": torch.tensor([label for _, label in examples])}


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(axis=1) == prediction.label_ids).mean())}


class Ready(TrainerCallback):
    def on_train_begin(self, *_, **__):
        ready()


sets = image_folders(args)
config = TimmWrapperConfig(architecture=args.model, num_labels=len(sets["train"].classes))
model = AutoModelForImageClassification.from_config(config)
model.timm_model.load_state_dict(state(args), strict=False)
if args.frozen:
    model.requires_grad_(False)
    model.timm_model.get_classifier().requires_grad_(True)
if args.tuned:
    model.timm_model = Tuned(model.timm_model, args)
tuned = {"dataloader_num_workers": cores, "dataloader_persistent_workers": True, "disable_tqdm": True}
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        optim="sgd",
        optim_args=f"momentum={MOMENTUM}",
        lr_scheduler_type="cosine",
        max_grad_norm=0,
        logging_steps=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=3,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=args.device.type == "cpu",
        bf16=args.bf16,
        **(tuned if args.tuned else {}),
    ),
    train_dataset=sets["train"],
    eval_dataset=sets["val"],
    data_collator=collate_fn,
    compute_metrics=compute_metrics,
    callbacks=[Ready()],
)
trainer.train()
result(accuracy=[line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line][-1])
