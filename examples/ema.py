"""The moving average of the weights that train: it is what is evaluated, saved as the model, used and exported.

python train.py --recipe examples/ema.py --data ~/photos --train head layer4

The trainer calls `train` and `eval` of an optimizer that has them, as schedule-free ones do: the average and the
weights of training change places. The statistics of a BatchNorm that trains are not averaged.
"""

import torch

LONGEST = 0.999  # the decay of the average in a long run; at update n it is at most (1 + n) / (10 + n)


class Averaged(torch.optim.AdamW):
    training = True

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for weight, state in self.state.items():
            if "average" not in state:
                state |= {"average": weight.clone(), "updates": 0}
            state["updates"] += 1
            decay = min(LONGEST, (1 + state["updates"]) / (10 + state["updates"]))
            state["average"].lerp_(weight, 1 - decay)

    def train(self):
        self.change_places(training=True)

    def eval(self):
        self.change_places(training=False)

    @torch.no_grad()
    def change_places(self, *, training):
        if training != self.training:
            self.training = training
            for weight, state in self.state.items():
                if "average" in state:
                    held = weight.clone()
                    weight.copy_(state["average"])
                    state["average"].copy_(held)


def optimizer(model, config, *, fused):
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
    ]
    return Averaged(groups, lr=config.lr, weight_decay=config.weight_decay, fused=fused)
