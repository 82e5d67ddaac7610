"""Multi-student distillation (MSD, arXiv 2410.23274): several students, each for a part of the prompts or labels.

What a student is asked for is less than what its teacher knows, so that it comes closer, or may be smaller. Each is
trained as DMD2's is, with a critic and a GAN head of its own, on its part of conditions and real images; a request is
routed to one of them, so that a sample costs what it did.

    accelerate launch -m fewstep.trainers.multi_student --teacher DIR --classes 0-999 --steps 1 --students 4 --out OUT

The students are trained one after the other, in ``OUT/student_1``, ... , and ``OUT/student`` is the pipeline of all.
``--only_student 2 --out OUT/student_2`` trains one, here or on another machine; a run of all then goes on from what
lies there. A student that is smaller than its teacher (``--student_network``) starts with fresh weights, which learn
what the teacher says of noised real samples first: E || student(x_t) - teacher(x_t) ||^2 in the network's own output
(the paper's teacher score matching).

Departures: the paper's first stage is DMD, with pairs of noise and sample, and its second one adds DMD2's GAN; here all
is DMD2, which needs no pairs. The paper weighs the pre-training by an unnamed lambda_t; ours is the teacher's own
training weight, times are uniform in the run's shift, and the teacher is not guided. The quadrants in which the paper
divides prompts are not described: ours are consecutive, listed, or k-means clusters, of which the paper says that
uneven ones gain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fewstep.cli.distill import main
from fewstep.data.batch import Batch
from fewstep.losses.score import denoising_loss, native_weight
from fewstep.trainers._multi_student_config import MultiStudentConfig
from fewstep.trainers.dmd2 import Dmd2
from fewstep.training.method import Bench, Order, Renew, Turn


class MultiStudent:
    """One of the students; see the module. Roles: those of DMD2.

    Args:
        config: of the run.
        own: the method by which the student is trained; its roles are this one's.
    """

    Config = MultiStudentConfig

    def __init__(self, config: MultiStudentConfig, own: Dmd2) -> None:
        self.config, self.own = config.resolved(), own
        self.roles, self.sampler = own.roles, own.sampler

    @classmethod
    def prepare(cls, config: MultiStudentConfig, bench: Bench) -> MultiStudent:
        """Make the roles; the bench has the student's part of conditions and real samples, and its network."""
        return cls(config, Dmd2.prepare(config, bench))

    def learning_rate(self, role: str) -> float:
        """Of the student or the critic."""
        return self.config.learning_rate(role)

    def learning_rate_at(self, role: str, step: int) -> float:
        """The same; the student's is another one in the pre-training, where one is given."""
        before = self.config.pretraining_lr
        pretrained = role == "student" and step < self.config.steps_before
        return before if pretrained and before is not None else self.learning_rate(role)

    def turns(self, step: int, batch: Batch) -> Iterator[Turn | Order]:
        """The pre-training's steps, where there are some, then DMD2's, counted from there."""
        before = self.config.steps_before
        if step < before:
            yield self.pretraining(batch)
            return
        if before and step == before:
            # Other gradients from here on; the average starts from what was learnt.
            yield Renew("student", like="student")
        yield from self.own.turns(step - before, batch)

    def pretraining(self, batch: Batch) -> Turn:
        """The student learns what the teacher says, unguided, of noised real samples of its own part."""
        real, teacher, student = batch.real, self.roles["teacher"], self.roles["student"]
        x_t, t, _ = self.own.learnt(real.x0, batch.draws, "pretraining")
        with torch.no_grad():
            target = teacher(x_t, t, real.conditioning)
        weight = native_weight(teacher.denoiser.prediction_type, self.own.learnt.schedule, t)
        loss = denoising_loss(target, student(x_t, t, real.conditioning), weight)
        return Turn("student", [(loss, None)], {"student/pretraining": loss.detach()})


if __name__ == "__main__":
    main("multi_student")
