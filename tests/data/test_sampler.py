import numpy as np
import pytest

from ssl_vit.data.sampler import SampleKey, StepSampler, epoch_order, sample_rng

SETTINGS = {"num_samples": 10, "batch_size": 4, "num_steps": 10, "seed": 0}


def flat(sampler: StepSampler) -> list[SampleKey]:
    return [key for keys in sampler for key in keys]


def test_every_image_once_an_epoch_and_no_short_batch() -> None:
    batches = list(StepSampler(**SETTINGS))
    assert [len(batch) for batch in batches] == [4] * 10
    keys = [key for batch in batches for key in batch]
    for epoch in range(4):
        drawn = keys[10 * epoch : 10 * (epoch + 1)]
        assert sorted(key.index for key in drawn) == list(range(10))
        assert [key.position for key in drawn] == list(range(10))
        assert {key.epoch for key in drawn} == {epoch}


def test_epochs_are_shuffled_differently_and_seeds_too() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_starting_in_the_middle_equals_having_run_there() -> None:
    whole = list(StepSampler(**SETTINGS))
    assert list(StepSampler(**SETTINGS, start_step=7)) == whole[7:]


@pytest.mark.parametrize(("num_micro", "num_processes"), [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_steps_hold_the_same_samples_however_they_are_cut(num_micro: int, num_processes: int) -> None:
    whole = list(StepSampler(**SETTINGS))
    parts = [
        list(StepSampler(**SETTINGS, num_micro=num_micro, process_index=index, num_processes=num_processes))
        for index in range(num_processes)
    ]
    for step, batch in enumerate(whole):
        micros = range(step * num_micro, (step + 1) * num_micro)
        assert [key for micro in micros for part in parts for key in part[micro]] == batch


def test_a_batch_may_be_larger_than_the_data() -> None:
    keys = flat(StepSampler(num_samples=3, batch_size=8, num_steps=1, seed=0))
    assert [key.epoch for key in keys] == [0, 0, 0, 1, 1, 1, 2, 2]


class TestRepeatedAugmentation:
    def test_each_image_is_drawn_so_often_in_a_row_with_generators_of_its_own(self) -> None:
        keys = flat(StepSampler(**{**SETTINGS, "num_steps": 15}, repeats=3))
        rows = [key.index for key in keys]
        assert rows[0::3] == rows[1::3] == rows[2::3]
        assert [(key.epoch, key.position) for key in keys] == [divmod(draw, 10) for draw in range(60)]
        assert len({sample_rng(0, key).random() for key in keys}) == 60

    def test_epochs_keep_their_length_and_in_as_many_of_them_each_image_is_drawn_so_often(self) -> None:
        keys = flat(StepSampler(**{**SETTINGS, "num_steps": 15}, repeats=3))
        for turn in range(2):  # of three epochs of ten draws
            rows = [key.index for key in keys if key.epoch // 3 == turn]
            assert sorted(rows) == sorted(3 * list(range(10)))
        first, second = ([key.index for key in keys if key.epoch // 3 == turn] for turn in range(2))
        assert first != second
        assert list(dict.fromkeys(first)) == epoch_order(10, 0, 0).tolist()

    def test_once_is_what_it_was(self) -> None:
        assert list(StepSampler(**SETTINGS, repeats=1)) == list(StepSampler(**SETTINGS))

    @pytest.mark.parametrize(("num_micro", "num_processes"), [(2, 1), (1, 2), (2, 2)])
    def test_neither_the_start_nor_the_cut_of_a_step_matters(self, num_micro: int, num_processes: int) -> None:
        whole = list(StepSampler(**SETTINGS, repeats=3))
        assert list(StepSampler(**SETTINGS, repeats=3, start_step=7)) == whole[7:]
        parts = [
            list(StepSampler(**SETTINGS, repeats=3, num_micro=num_micro, process_index=k, num_processes=num_processes))
            for k in range(num_processes)
        ]
        for step, batch in enumerate(whole):
            micros = range(step * num_micro, (step + 1) * num_micro)
            assert [key for micro in micros for part in parts for key in part[micro]] == batch


def test_uneven_cuts_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size=4: not divisible into 3 micro-batches x 1 processes"):
        StepSampler(**SETTINGS, num_micro=3)


def test_generators_differ_by_seed_epoch_and_position_but_not_by_index() -> None:
    keys = [
        (0, SampleKey(0, 0, 5)),
        (1, SampleKey(0, 0, 5)),
        (0, SampleKey(1, 0, 5)),
        (0, SampleKey(0, 1, 5)),
    ]
    draws = [sample_rng(seed, key).random() for seed, key in keys]
    assert len(set(draws)) == 4
    assert sample_rng(0, SampleKey(0, 0, 9)).random() == draws[0]
    assert np.random.default_rng((0, 0)).random() != draws[0]
