import random

import numpy as np
import pytest
import torch
from tensors import Tensors

from trainer.data.loader import BatchLoader, KeyedDataset
from trainer.data.sampling import BatchPlan, epoch_order, kept_randomness, random_key, seed_all
from trainer.errors import DataError, UsageError


def test_random_keys_are_stable_and_differ_by_every_part():
    assert random_key(0, "order", 1) == random_key(0, "order", 1)
    assert random_key(0, "step", 1, 0) == 6697652200206715743  # this number never changes: old runs must resume
    assert (
        len({random_key(seed, "step", step, micro) for seed in range(5) for step in range(5) for micro in range(5)})
        == 125
    )
    assert random_key(1, 23) != random_key(12, 3)


def test_seeds_cover_three_generators_and_kept_randomness_restores_them():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draws = []
    for _ in range(2):
        with kept_randomness():
            seed_all(random_key(7, "augment", 3), devices=False)
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_every_epoch_has_its_own_order():
    orders = [epoch_order(50, seed=0, epoch=epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert epoch_order(50, seed=0, epoch=1) == orders[1]
    assert epoch_order(50, seed=1, epoch=1) != orders[1]


@pytest.mark.parametrize("samples", [8, 37, 64, 65])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_micro_batches_are_the_same_on_any_number_of_processes(samples, processes):
    alone = BatchPlan(samples, 16, 2, 1)
    plan = BatchPlan(samples, 16, 2, processes)
    seen = []
    for window, expected in zip(plan.windows(seed=0, epoch=2), alone.windows(seed=0, epoch=2), strict=True):
        assert window == expected
        shares = [plan.share(window, rank=rank) for rank in range(processes)]
        assert all(shares), "a process without a micro-batch would not take part in the reduction"
        micros = sorted(micro for share in shares for micro in share if micro.counts)
        assert micros == alone.share(window, rank=0)
        seen += [index for micro in micros for index in micro.indices]
    assert sorted(seen) == list(range(samples))


def test_windows_start_anywhere():
    plan = BatchPlan(37, 8, 4, 2)
    assert list(plan.windows(seed=0, epoch=1, start=16)) == list(plan.windows(seed=0, epoch=1))[2:]


@pytest.mark.parametrize("samples", [1, 3, 35])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_counts_each_sample_once(processes, samples):
    plan = BatchPlan(100, 8, 2, processes)
    batches = [batch for rank in range(processes) for batch in plan.eval_batches(samples, rank=rank)]
    assert sorted(index for batch in batches for index in batch) == list(range(samples))


def test_plan_prints_its_arithmetic():
    plan = BatchPlan(1000, 64, 8, 4)
    assert (plan.accumulation, plan.steps_per_epoch) == (2, 16)
    first, second = str(plan).split("; ")
    assert first == "batch 64 = micro-batch 8 × 4 processes × accumulation 2"
    assert str(BatchPlan(1, 1, 1, 1)).endswith("; 1 image = 1 step an epoch")
    assert second == "1,000 images = 16 steps an epoch (the last of 40 images)"


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ((100, 10, None, 4), "8 or 12 would"),
        ((100, 64, 6, 2), "micro_batch can be 1, 2, 4, 8, 16, 32; with micro_batch 6, batch_size can be 60 or 72"),
        ((100, 4, 4, 2), "micro_batch can be 1, 2; with micro_batch 4, batch_size can be 8"),
        ((2, 4, 1, 4), "too few for 4 processes"),
        ((10, 0, None, 1), "at least 1"),
    ],
)
def test_numbers_that_do_not_divide_name_ones_that_do(numbers, says):
    with pytest.raises(UsageError, match=says):
        BatchPlan(*numbers)


class _Noise:
    """A transform that draws from everything a user's transform may draw from."""

    def __call__(self, image):
        drawn = random.random() + np.random.rand() + torch.rand(()).item()
        return (image.float() * drawn).to(torch.uint8)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_workers_gives_the_same_bytes(workers):
    images = torch.randint(0, 255, (10, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    dataset = KeyedDataset(Tensors(images, list(range(10))), _Noise(), seed=3)
    state = torch.get_rng_state()
    loader = BatchLoader(dataset, workers=workers)
    first = list(loader([[(0, 1), (0, 2)], [(0, 3)]]))
    again = list(loader([[(1, 1), (0, 2)], [(0, 3)]]))  # another epoch for image 1 alone; the workers live on
    assert torch.equal(torch.get_rng_state(), state)

    expected = [torch.stack([dataset[0, 1]["image"], dataset[0, 2]["image"]]), dataset[0, 3]["image"][None]]
    assert all(torch.equal(batch["image"], image) for batch, image in zip(first, expected, strict=True))
    assert first[0]["label"].tolist() == first[0]["index"].tolist() == [1, 2]
    assert not torch.equal(again[0]["image"][0], first[0]["image"][0])
    assert torch.equal(again[0]["image"][1], first[0]["image"][1])
    assert torch.equal(again[1]["image"], first[1]["image"])


def test_a_loader_left_in_the_middle_starts_anew():
    images = torch.zeros(10, 3, 2, 2, dtype=torch.uint8)
    loader = BatchLoader(KeyedDataset(Tensors(images, list(range(10))), lambda image: image, seed=0), workers=1)
    next(loader([[(0, 1)], [(0, 2)], [(0, 3)]]))
    assert [batch["index"].item() for batch in loader([[(0, 7)], [(0, 8)]])] == [7, 8]


class _Broken(torch.utils.data.Dataset):
    def item(self, request):
        if request[1] in (2, 3):
            raise DataError("photo.jpg cannot be read")
        return {"index": request[1], "image": torch.zeros(3, 2, 2)}


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_cannot_read_is_one_message(workers):
    loader = BatchLoader(_Broken(), workers=workers)
    batches = loader([[(0, 1)], [(0, 0), (0, 2)]])
    assert next(batches)["index"].tolist() == [1]
    with pytest.raises(DataError, match=r"^photo.jpg cannot be read\. To omit .* --bad-images skip$"):
        next(batches)
    with pytest.raises(DataError, match=r"^photo.jpg cannot be read \(and 1 more of the 3 images of this batch\)\. To"):
        list(loader([[(0, 2), (0, 0), (0, 3)]]))
    if workers:
        loader._loader._iterator._shutdown_workers()  # the garbage collector would wait ten seconds for them
