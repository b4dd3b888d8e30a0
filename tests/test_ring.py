"""What two processes share: nothing lost, nothing twice, nothing out of order, nobody waits."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime.ring import Mailbox, Ring


@contextmanager
def ring(capacity: int, width: int) -> Iterator[tuple[Ring, Ring]]:
    """The producer's and the consumer's end."""
    with Ring.create(capacity, width) as owner, Ring.attach(owner.name) as other:
        yield other, owner


@settings(max_examples=80, deadline=None)
@given(
    capacity=st.integers(1, 50),
    width=st.integers(1, 3),
    actions=st.lists(st.tuples(st.booleans(), st.integers(0, 60)), max_size=60),
)
def test_a_ring_is_a_bounded_queue(capacity: int, width: int, actions: list[tuple[bool, int]]) -> None:
    with ring(capacity, width) as (producer, consumer):
        queue: list[float] = []
        number, dropped = 0.0, 0
        for push, count in actions:
            if push:
                values = number + np.arange(count, dtype=np.float32)
                frames = np.repeat(values[:, None], width, axis=1)
                fits = len(queue) + count <= capacity
                assert producer.push(frames) is fits
                if fits:
                    queue += values.tolist()
                else:
                    dropped += count
                number += count
            else:
                got = consumer.pop(count)
                expected, queue = queue[:count], queue[count:]
                assert got.shape == (len(expected), width)
                assert (got == np.array(expected, np.float32)[:, None]).all()
            assert len(consumer) == len(producer) == len(queue)
            assert consumer.dropped == dropped
        assert consumer.pop()[:, 0].tolist() == queue


def test_a_popped_frame_is_a_copy() -> None:
    with ring(4, 1) as (producer, consumer):
        producer.push(np.full((4, 1), 1.0, np.float32))
        got = consumer.pop()
        producer.push(np.full((4, 1), 2.0, np.float32))
        assert (got == 1.0).all()


def _produce(name: str, count: int) -> None:
    with Ring.attach(name) as producer:
        sent = 0
        while sent < count:
            size = min(count - sent, sent % 37 + 1)
            frames = np.repeat((sent + np.arange(size, dtype=np.float32))[:, None], 2, axis=1)
            if producer.push(frames):
                sent += size
            else:
                time.sleep(0.0005)


def test_another_process_sends_everything_in_order() -> None:
    count = 100_000
    with Ring.create(500, 2) as consumer:
        process = multiprocessing.get_context("spawn").Process(target=_produce, args=(consumer.name, count))
        process.start()
        got, deadline = [], time.monotonic() + 60
        while sum(map(len, got)) < count and time.monotonic() < deadline:
            got.append(consumer.pop())
        process.join(10)
        received = np.concatenate(got)
        assert (received == np.arange(count, dtype=np.float32)[:, None]).all() and len(received) == count


@pytest.mark.parametrize(("capacity", "width"), [(0, 1), (1, 0), (-1, 2)])
def test_a_ring_of_nothing_is_refused(capacity: int, width: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Ring.create(capacity, width)


def test_a_mailbox_holds_the_latest_value() -> None:
    with Mailbox.create(3) as writer, Mailbox.attach(writer.name) as reader:
        assert not reader.changed()
        writer.write(np.array([1.0, 2.0, 3.0]))
        writer.write(np.array([4.0, 5.0, 6.0]))
        assert reader.changed()
        assert reader.read().tolist() == [4.0, 5.0, 6.0]
        assert not reader.changed()
        assert reader.read().tolist() == [4.0, 5.0, 6.0]


def test_a_mailbox_in_the_middle_of_a_write_keeps_its_last_value() -> None:
    with Mailbox.create(2) as writer, Mailbox.attach(writer.name) as reader:
        writer.write(np.array([1.0, 1.0]))
        assert reader.read().tolist() == [1.0, 1.0]
        writer._words[0] += 1  # a write has begun
        writer._values[0] = 2.0
        assert reader.read().tolist() == [1.0, 1.0]
        writer._values[1] = 2.0
        writer._words[0] += 1
        assert reader.read().tolist() == [2.0, 2.0]


def _write_pairs(name: str, count: int) -> None:
    with Mailbox.attach(name) as writer:
        for i in range(count):
            writer.write(np.full(200, float(i)))


def test_a_mailbox_never_shows_half_a_write_of_another_process() -> None:
    with Mailbox.create(200) as reader:
        process = multiprocessing.get_context("spawn").Process(target=_write_pairs, args=(reader.name, 30_000))
        process.start()
        latest, changes = -1.0, 0
        while process.is_alive():
            value = reader.read()
            assert (value == value[0]).all()
            assert value[0] >= latest or latest < 0
            changes += value[0] != latest
            latest = value[0]
        process.join()
        assert reader.read()[0] == 29_999.0 and changes > 1


def test_the_owner_removes_the_memory() -> None:
    owner = Ring.create(8, 1)
    name = owner.name
    owner.close()
    with pytest.raises(FileNotFoundError):
        Ring.attach(name)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory lies elsewhere")
def test_where_there_is_no_room_for_a_ring_it_is_refused_and_nothing_is_left() -> None:
    """And not ended by a signal when it is first written to."""
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(OSError, match="No space left"):
        Ring.create(shutil.disk_usage("/dev/shm").total // 2, 1)
    assert not {path for path in Path("/dev/shm").iterdir() if path.name.startswith("psm_")} - before
