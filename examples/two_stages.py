"""First the head alone; then, from its best checkpoint, more of the model at a tenth of the rate.

python examples/two_stages.py --data ~/photos --model resnet50 --train head layer4 --output runs/photos

Flags are those of train.py; --train says what trains in the second stage. The runs are OUTPUT/head and OUTPUT/all. The
same command again continues where it was interrupted. As two commands, which do the same:

python train.py --data ~/photos --model resnet50 --output runs/photos/head --resume auto
python train.py --data ~/photos --model resnet50 --train head layer4 --lr 1e-4 \\
    --weights runs/photos/head/checkpoints/best.pt --output runs/photos/all --resume auto
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py

import train
import trainer
from trainer.cli import end_at_once, parse
from trainer.config import replace
from trainer.errors import UsageError


def main(config):
    if config.model.train == ("head",):
        raise UsageError("say what trains in the second stage, such as --train head layer4 or --train all.")
    folder = Path(config.run.output or "runs/two_stages")
    head = replace(config, train=("head",), output=str(folder / "head"), resume="auto")
    train.main(head)
    best = str(folder / "head" / "checkpoints" / "best.pt")
    more = replace(config, weights=best, lr=config.optim.settled().lr / 10, output=str(folder / "all"), resume="auto")
    train.main(more)


if __name__ == "__main__":
    end_at_once()
    trainer.run_and_exit(main, parse(__doc__))
