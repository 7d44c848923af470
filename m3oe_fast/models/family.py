"""The members of a form as one model: each row goes to those members that know its domain.

Form mtl has a member per domain, mdl one per task, single one per (domain, task). A family is scored, measured and
saved like a model, and keeps the whole log's vocabularies; a member counts its domains and tasks from 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m3oe_fast import checkpoint
from m3oe_fast.errors import CheckpointError
from m3oe_fast.model import BagFields, RankingModel, Scorer


class Member(NamedTuple):
    """One model of a family.

    Attributes:
        domains, tasks: those it is of, numbered as in the whole log, ascending.
        model: of D' = len(domains) and T' = len(tasks).
    """

    domains: tuple[int, ...]
    tasks: tuple[int, ...]
    model: RankingModel


class Family(Scorer):
    """Members as one model.

    Args:
        form: "single", "mtl" or "mdl".
        members: no two of the same (domain, task); all of one kind of model and on one device. A pair that none has is
            not scored: NaN.
        num_domains, num_tasks: D and T of the whole log.
    """

    def __init__(self, form: str, members: Sequence[Member], num_domains: int, num_tasks: int) -> None:
        super().__init__()
        self.form = form
        self.members = tuple(members)
        self.models = nn.ModuleList([member.model for member in members])
        self.num_domains, self.num_tasks = num_domains, num_tasks

    @property
    def config(self) -> Any:
        """The configuration of the first member: the kind of model, and what all share."""
        return self.members[0].model.config

    @property
    def backend_name(self) -> str:
        """The backend that serves the members."""
        return self.members[0].model.backend_name

    @property
    def isa_name(self) -> str | None:
        """As of a model."""
        return self.members[0].model.isa_name

    @property
    def precision(self) -> str:
        """As of a model."""
        return self.members[0].model.precision

    @property
    def compute_precision(self) -> str:
        """As of a model."""
        return self.members[0].model.compute_precision

    def missing_pairs(self) -> set[tuple[int, int]]:
        """The pairs (domain, task) that no member has."""
        pairs = {(d, t) for d in range(self.num_domains) for t in range(self.num_tasks)}
        return pairs - {(d, t) for member in self.members for d in member.domains for t in member.tasks}

    def fusion_values(self) -> dict[str, Any]:
        """None: members have their own."""
        return {}

    def multiply_adds(self) -> int:
        """Of a row's members together, for the domain with most."""
        of_domains = [0] * self.num_domains
        for member in self.members:
            for d in member.domains:
                of_domains[d] += member.model.multiply_adds()
        return max(of_domains)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields = ()) -> Tensor:
        """Logits float32 [B, T]; arguments as for a model."""
        return self._gathered(ids, dense, domain, bags, lambda member, inputs: member.model(*inputs))

    @torch.no_grad()
    def predict(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields = ()) -> Tensor:
        """Probabilities float32 [B, T]; arguments as for a model."""
        return self._gathered(ids, dense, domain, bags, lambda member, inputs: member.model.predict(*inputs))

    def _gathered(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields, compute: Any) -> Tensor:
        self._check_domain(ids, domain)
        result = torch.full((len(domain), self.num_tasks), float("nan"), device=domain.device)
        for member in self.members:
            own = torch.full((self.num_domains,), -1, dtype=domain.dtype, device=domain.device)
            own[list(member.domains)] = torch.arange(len(member.domains), dtype=domain.dtype, device=domain.device)
            place = own[domain.long()]
            rows = (place >= 0).nonzero()[:, 0]
            inputs = (ids[rows], dense[rows], place[rows], tuple(take(bag, rows) for bag in bags))
            tasks = torch.tensor(member.tasks, device=domain.device)
            result[rows[:, None], tasks] = compute(member, inputs).to(result.dtype)
        return result

    def _check_domain(self, ids: Tensor, domain: Tensor) -> None:
        if domain.shape != ids.shape[:1]:
            raise ValueError(f"domain must be [B] = {list(ids.shape[:1])}, got {list(domain.shape)}")
        # On a GPU too, unlike a model: choosing the members' rows waits for it anyway.
        wrong = (domain < 0) | (domain >= self.num_domains)
        if wrong.any():
            row = wrong.nonzero()[0].item()
            raise ValueError(f"domain[{row}] is {domain[row].item()}, the family has {self.num_domains} domains")

    def check_inputs(self) -> None:
        """As of a model."""
        for member in self.members:
            member.model.check_inputs()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/model.pt, which `m3oe_fast.load` reads: all members and the vocabularies.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        members = [
            {"domains": list(m.domains), "tasks": list(m.tasks), "config": m.model.config.to_dict()}
            for m in self.members
        ]
        content = {
            "model": self.config.name,
            "config": {
                "form": self.form,
                "num_domains": self.num_domains,
                "num_tasks": self.num_tasks,
                "members": members,
            },
            "weights": {
                f"{i}.{name}": value for i, m in enumerate(self.members) for name, value in m.model.state_dict().items()
            },
            "encoder": None if self.encoder is None else self.encoder.to_dict(),
            "trainer": None,
        }
        checkpoint.write(Path(folder) / checkpoint.FILE_NAME, content)


def is_family(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds the members of a form."""
    return isinstance(content["config"], Mapping) and "members" in content["config"]


def first_member(content: Mapping[str, Any], path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What a family's checkpoint says of its first member: "domains", "tasks" and "config".

    Raises:
        CheckpointError: it says nothing that can be read.
    """
    members = content["config"]["members"]
    if (
        not isinstance(members, list)
        or not members
        or not isinstance(members[0], Mapping)
        or "config" not in members[0]
    ):
        raise CheckpointError(f"{path} holds no members that this version can read: it is damaged, use another one")
    return members[0]


def from_checkpoint(
    kind: type[RankingModel],
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    backend: str,
    precision: str,
    sparse_grad: bool,
) -> Family:
    """The family in what `checkpoint.read(path)` gave, in `eval()` mode.

    Raises:
        CheckpointError: it does not fit this version, or is damaged.
    """
    config, weights = content["config"], content["weights"]
    members = []
    try:
        for i, described in enumerate(config["members"]):
            own = {name.partition(".")[2]: value for name, value in weights.items() if name.partition(".")[0] == str(i)}
            part = {"config": described["config"], "weights": own, "encoder": None}
            model = kind.from_checkpoint(part, path, backend=backend, precision=precision, sparse_grad=sparse_grad)
            members.append(Member(tuple(described["domains"]), tuple(described["tasks"]), model))
        family = Family(config["form"], members, config["num_domains"], config["num_tasks"])
        if not members or not all(_fits(member, family) for member in members):
            raise CheckpointError(f"{path} holds members of other domains or tasks than it says: it is damaged")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} holds members that this version cannot read ({error!r})") from error
    family.encoder = checkpoint.encoder_of(content, path)
    return family.eval()


def _fits(member: Member, family: Family) -> bool:
    """Whether a member's domains and tasks are the family's, and as many as its model has."""
    c = member.model.config
    known = set(member.domains) <= set(range(family.num_domains)) and set(member.tasks) <= set(range(family.num_tasks))
    return known and (len(set(member.domains)), len(set(member.tasks))) == (c.num_domains, c.num_tasks)


def take(bag: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows int64 [n] of a bag (values, offsets), in this order, with offsets from 0."""
    values, offsets = bag
    lengths = (offsets[1:] - offsets[:-1])[rows]
    ends = lengths.cumsum(0)
    taken = torch.cat([ends.new_zeros(1), ends])
    shift = torch.repeat_interleave(offsets[:-1][rows] - taken[:-1], lengths)
    return values[torch.arange(len(shift), device=values.device) + shift], taken
