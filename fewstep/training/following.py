"""Implicit distribution alignment: a critic is pulled towards the student, and needs fewer updates to follow it then.

A student that moved makes other samples. The critic, taken a part of the same way in weights, begins nearer to their
score than it would where it was (SenseFlow, arXiv 2506.00523).
"""

from __future__ import annotations

from fewstep.networks.roles import Role, trained_pairs
from fewstep.training.method import Pull


def pulls_after_student(critic: Role, student: Role, decay: float) -> tuple[Pull, ...]:
    """What a method is to yield when the student has moved: nothing where ``decay``, what the critic keeps, is 1.

    Raises:
        UserError: one of them is trained as an adapter and the other as a full copy, or they have other experts.
    """
    if decay == 1:
        return ()
    trained_pairs(critic, student)  # refuses before the run has begun
    return (Pull(critic.name, student.name, decay),)
