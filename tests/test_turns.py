"""Whose turn it is: training gives way to people, and people to training."""

import threading

import pytest

from lowrank_align.turns import Turns


def test_people_have_their_turn_between_pieces_of_a_run() -> None:
    """The run does piece 1 while a person waits, gives way, and goes on with piece 2 after the person's turn."""
    turns, order = Turns(), []
    asked = threading.Event()

    def person() -> None:
        asked.set()
        with turns.foreground():
            order.append("person")

    with turns.background():
        thread = threading.Thread(target=person)
        thread.start()
        asked.wait()
        while not turns._asking:  # until it waits
            threading.Event().wait(0.001)
        order.append("piece 1")
        turns.give_way()
        order.append("piece 2")
    thread.join()
    assert order == ["piece 1", "person", "piece 2"]


def test_a_run_gets_its_piece_between_two_turns_of_people() -> None:
    """A person who asks again at once does not get the base twice in a row: each of 5 turns is followed by a piece."""
    turns, order = Turns(), []

    def person() -> None:
        for _ in range(5):
            with turns.foreground():
                order.append("person")

    thread = threading.Thread(target=person)
    with turns.background():
        thread.start()
        while order.count("person") < 5:
            before = order.count("person")
            turns.give_way()
            assert order.count("person") <= before + 1
            order.append("piece")
    thread.join()
    assert "person person" not in " ".join(order)


def test_without_a_run_nobody_waits() -> None:
    turns = Turns()
    for _ in range(3):
        with turns.foreground():
            turns.give_way()  # not the run's thread: nothing happens


def test_two_runs_at_once_are_a_mistake() -> None:
    turns = Turns()
    with turns.background(), pytest.raises(RuntimeError, match="another run"), turns.background():
        raise AssertionError("entered")


def test_a_turn_that_fails_is_given_back() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.foreground():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), turns.background():
        raise ZeroDivisionError
    with turns.background():
        turns.give_way()
    with turns.foreground():
        assert turns._taken
