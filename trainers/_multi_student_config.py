"""What a run of several students is told (:mod:`fewstep.trainers.multi_student`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewstep.config.partition import PartitionWanted
from fewstep.errors import UserError
from fewstep.trainers._dmd2_config import Dmd2Config


@dataclass(kw_only=True)
class MultiStudentConfig(Dmd2Config):
    """Multi-student distillation; every setting of DMD2 is that of each student.

    Args:
        students: how many there are, each trained for --max_steps steps; default as many as --lists, or 4
            (the paper's).
        partition: how prompts or labels are divided among them: consecutive (the paper's for ImageNet: equal parts, in
            their order), clusters (k-means of what the network is told for each prompt; needs scipy), or lists.
        lists: with --partition lists, of each student its labels, such as [0-4,5-8,9], or its file of prompts; together
            they are the run's.
        only_student: train this one alone, from 1. With --out RUN/student_K it is where a run of all in RUN goes on.
        student_network: JSON of the settings in which the students' network is another than the teacher's, such as
            {"num_layers": 4}: it has fresh weights, and is pre-trained.
        pretraining_steps: first steps of --max_steps in which such a network learns what the teacher says of noised
            real data, of its own part (TSM; needs --data); default a third of them.
        pretraining_lr: learning rate in these steps; default --lr.
    """

    students: int | None = None
    partition: str = "consecutive"
    lists: list[str | int] | None = None
    only_student: int | None = None
    student_network: dict[str, Any] | None = None
    pretraining_steps: int | None = None
    pretraining_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lists is not None:  # a label that stands alone is a number in YAML
            self.lists = [str(one) for one in self.lists]
        self._refuse_below_one("students", "only_student")
        self._refuse_unknown("partition", "consecutive", "clusters", "lists")
        self._refuse_negative("pretraining_steps", "pretraining_lr")
        if (self.partition == "lists") != bool(self.lists):
            raise UserError("--partition lists and --lists belong together: give both, or neither")
        if self.lists and self.students not in (None, len(self.lists)):
            raise UserError(f"--students {self.students} and {len(self.lists)} --lists: leave out --students")
        if self.only_student is not None and self.only_student > self.count:
            raise UserError(f"--only_student {self.only_student}: there are {self.count} students, counted from 1")
        if self.student_network is None:
            self._refuse_set("belongs to --student_network", "pretraining_steps", "pretraining_lr")
            return
        if not self.student_network:
            raise UserError("--student_network changes nothing: name a setting of the network, or leave it out")
        if self.critic_follows_student != 1:
            raise UserError("--critic_follows_student mixes weights of one shape: leave it or --student_network out")
        if self.lora_rank or self.quantization is not None:
            raise UserError("--student_network makes a network of its own, without adapters: leave out --lora_rank")
        steps = self.steps_before
        if steps and self.data is None:
            raise UserError(
                "--student_network starts with fresh weights, which learn from real images first: give --data, or "
                "--pretraining_steps 0 with --init"
            )
        if not steps and self.init is None:
            raise UserError("--student_network has fresh weights: leave out --pretraining_steps 0, or give --init")
        if steps >= self.max_steps:
            raise UserError(f"--pretraining_steps {steps} leave nothing of --max_steps {self.max_steps}; give more")

    def consequences(self) -> dict[str, Any]:
        """How many students, and the steps of their pre-training, which a run that goes on longer keeps."""
        before = {} if self.student_network is None else {"pretraining_steps": self.steps_before}
        return super().consequences() | {"students": self.count} | before

    @property
    def count(self) -> int:
        """Of students."""
        return self.students or (len(self.lists) if self.lists else 4)

    @property
    def steps_before(self) -> int:
        """Steps of the pre-training."""
        if self.student_network is None:
            return 0
        return self.max_steps // 3 if self.pretraining_steps is None else self.pretraining_steps

    @property
    def uses_data(self) -> bool:
        """Whether real images are used, by the GAN or before the training."""
        return super().uses_data or self.steps_before > 0

    @property
    def partition_wanted(self) -> PartitionWanted:
        """How the conditions are divided."""
        lists = tuple(map(str, self.lists or ()))
        return PartitionWanted(self.count, self.partition, lists, self.only_student, self.seed)

    @property
    def resized_network(self) -> dict[str, Any] | None:
        """What is another in the student's network."""
        return self.student_network
