"""Plain PyTorch, as in the official tutorial's "ConvNet as fixed feature extractor".

Follows https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html: the whole model in train mode
(which moves the frozen BatchNorm statistics), a host sync after every step, four data workers, the best weights saved
to a file and loaded again at the end.
Unequal: the job's batch size and cosine instead of the tutorial's 4 and StepLR.
"""

import os

import torch
from job import MOMENTUM, arguments, cosine, loaders, network, ready, result
from torch import nn

args = arguments(__doc__)
train, val = loaders(args, workers=4)
model = network(args, len(train.dataset.classes)).to(args.device)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD((model if args.train == "all" else model.fc).parameters(), lr=args.lr, momentum=MOMENTUM)
scheduler = cosine(optimizer, args.epochs * len(train))
best, best_path = -1.0, os.path.join(args.output, "best.pt")
ready()

for epoch in range(args.epochs):
    for phase, batches in (("train", train), ("val", val)):
        training = phase == "train"
        model.train(training)
        loss_sum = correct = torch.zeros((), device=args.device)
        for inputs, labels in batches:
            inputs, labels = inputs.to(args.device), labels.to(args.device)
            optimizer.zero_grad()
            with torch.set_grad_enabled(training):
                outputs = model(inputs)
                loss = criterion(outputs, labels)
            if training:
                loss.backward()
                optimizer.step()
                scheduler.step()
            loss_sum = loss_sum + (loss.detach() if args.tuned else loss.item()) * len(inputs)
            correct = correct + (outputs.argmax(1) == labels).sum()
        accuracy = float(correct) / len(batches.dataset)
        print(f"{epoch} {phase} loss {float(loss_sum) / len(batches.dataset):.4f} accuracy {accuracy:.4f}")
    if accuracy > best:
        best = accuracy
        torch.save(model.state_dict(), best_path)
model.load_state_dict(torch.load(best_path, weights_only=True))
result(accuracy=accuracy)
