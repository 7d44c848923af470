"""M3oE in the style of the published research code, in our own words: one module per layer, loops
over everything.

Every domain's star product runs on every row and `torch.where` keeps the row's own; so do all D*T
gates and towers. One embedding table per field; the loss is binary cross-entropy of probabilities,
one masked mean per pair. What only costs the published code time by accident is left out: copies
between devices, `.item()`, `.tolist()`, outputs allocated elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3oe_fast import M3oE, M3oEConfig

# One parameter of this module as a part of one of M3oE's: (M3oE name, index into it, parameter,
# stored transposed).
Slot = tuple[str, tuple[int | slice, ...], nn.Parameter, bool]


class NormedLayer(nn.Sequential):
    """Linear, LayerNorm, ReLU."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.Linear(width, out), nn.LayerNorm(out), nn.ReLU())

    def slots(self, name: str, index: tuple[int | slice, ...], suffix: str = "") -> Iterator[Slot]:
        linear, norm, _ = self
        yield f"{name}_weight{suffix}", index, linear.weight, True
        yield f"{name}_bias{suffix}", index, linear.bias, False
        yield f"{name}_gain{suffix}", index, norm.weight, False
        yield f"{name}_offset{suffix}", index, norm.bias, False


class PublishedM3oE(nn.Module):
    """The published layout, with the weights of an M3oE.

    Raises:
        ValueError: the configuration uses a switch that the published code does not have.
    """

    def __init__(self, source: M3oE) -> None:
        super().__init__()
        c = source.config
        if c.star_activation != "norm_relu" or not c.gate_detach or c.fusion != "scalar" or c.shared_experts < 1:
            raise ValueError("the published code has norm_relu, detached gates, scalar fusion, shared experts")
        if c.modules != "balanced" or not (c.domain_experts and c.task_experts) or c.bag_vocab_sizes:
            raise ValueError("the published code has balanced modules, domain and task experts, no bags")
        self.config: M3oEConfig = c
        pairs = c.num_domains * c.num_tasks

        def expert() -> nn.Sequential:
            return nn.Sequential(*(NormedLayer(i, o) for i, o in pairwise((c.hidden_dim, *c.expert_dims))))

        self.embedding = nn.ModuleList(nn.Embedding(v, c.embed_dim) for v in c.vocab_sizes)
        self.shared_weight = nn.Parameter(torch.empty(c.input_dim, c.star_dim))
        self.shared_bias = nn.Parameter(torch.empty(c.star_dim))
        self.slot_weight = nn.ParameterList(torch.empty(c.input_dim, c.star_dim) for _ in range(c.num_domains))
        self.slot_bias = nn.ParameterList(torch.empty(c.star_dim) for _ in range(c.num_domains))
        self.star_mlp = NormedLayer(c.star_dim, c.hidden_dim)
        self.skip = NormedLayer(c.input_dim, c.hidden_dim)
        self.shared_expert = nn.ModuleList(expert() for _ in range(c.shared_experts))
        self.domain_expert = nn.ModuleList(expert() for _ in range(c.num_domains))
        self.task_expert = nn.ModuleList(expert() for _ in range(c.num_tasks))
        self.gate = nn.ModuleList(
            nn.Sequential(nn.Linear(c.hidden_dim, c.shared_experts), nn.Softmax(1)) for _ in range(pairs)
        )
        self.tower = nn.ModuleList(
            nn.Sequential(NormedLayer(c.expert_dim, c.tower_dim), nn.Linear(c.tower_dim, 1)) for _ in range(pairs)
        )
        self.alpha_domain = nn.Parameter(torch.empty(()))
        self.alpha_task = nn.Parameter(torch.empty(()))
        self.beta_domain = nn.Parameter(torch.empty(()))
        self.beta_task = nn.Parameter(torch.empty(()))
        self._copy_from(source)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        """Logits [B, T]; ids int [B, F], dense float [B, C], domain int [B]."""
        fields = [table(ids[:, f]) for f, table in enumerate(self.embedding)]
        return self.network(torch.cat([*fields, dense], dim=1), domain)

    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        """Logits [B, T] from x [B, I]."""
        c = self.config
        own = [domain == d for d in range(c.num_domains)]
        star = x.new_zeros(x.shape[0], c.star_dim)
        for d in range(c.num_domains):
            product = x @ (self.slot_weight[d] * self.shared_weight) + self.slot_bias[d] + self.shared_bias
            star = torch.where(own[d].unsqueeze(1), product, star)
        r = self.skip(x) + self.star_mlp(star)

        z_shared = torch.stack([expert(r) for expert in self.shared_expert], dim=1)
        z_domain = [expert(r) for expert in self.domain_expert]
        z_task = [expert(r) for expert in self.task_expert]
        alpha_domain, alpha_task = torch.sigmoid(self.alpha_domain), torch.sigmoid(self.alpha_task)
        beta_domain, beta_task = torch.sigmoid(self.beta_domain), torch.sigmoid(self.beta_task)
        domain_part = [_balance(z_domain, d, beta_domain) for d in range(c.num_domains)]
        task_part = [_balance(z_task, t, beta_task) for t in range(c.num_tasks)]

        logits = []
        for t in range(c.num_tasks):
            column = x.new_zeros(x.shape[0])
            for d in range(c.num_domains):
                pair = t * c.num_domains + d
                gate = self.gate[pair](r.detach()).unsqueeze(1)
                shared_part = torch.bmm(gate, z_shared).squeeze(1)
                fused = shared_part + alpha_domain * domain_part[d] + alpha_task * task_part[t]
                column = torch.where(own[d], self.tower[pair](fused).squeeze(1), column)
            logits.append(column)
        return torch.stack(logits, dim=1)

    def loss(self, ids: Tensor, dense: Tensor, domain: Tensor, label: Tensor) -> Tensor:
        """Sum over (domain, task) of the mean cross-entropy; label float [B, T], NaN = not
        observed.
        """
        return self.loss_of(self(ids, dense, domain), domain, label)

    def loss_of(self, logits: Tensor, domain: Tensor, label: Tensor) -> Tensor:
        """The same from logits [B, T]: cross-entropy of probabilities does not run under autocast on a GPU."""
        probability = torch.sigmoid(logits)
        total = probability.new_zeros(())
        for d in range(self.config.num_domains):
            for t in range(self.config.num_tasks):
                mask = ((domain == d) & ~torch.isnan(label[:, t])).to(probability.dtype)
                target = torch.nan_to_num(label[:, t])
                summed = F.binary_cross_entropy(probability[:, t], target, weight=mask, reduction="sum")
                total = total + summed / mask.sum().clamp(min=1)
        return total

    def gradients(self) -> dict[str, Tensor]:
        """The gradients under the names and in the shapes of `M3oE.named_parameters()`."""
        shapes = {name: parameter.shape for name, parameter in M3oE(self.config, "reference").named_parameters()}
        result = {name: self.shared_weight.new_zeros(shape) for name, shape in shapes.items()}
        for name, index, parameter, transposed in self._slots():
            if parameter.grad is not None:
                result[name][index] = parameter.grad.T if transposed else parameter.grad
        return result

    @torch.no_grad()
    def _copy_from(self, source: M3oE) -> None:
        weights = dict(source.named_parameters())
        for name, index, parameter, transposed in self._slots():
            part = weights[name][index]
            parameter.copy_(part.T if transposed else part)

    def _slots(self) -> Iterator[Slot]:
        c = self.config
        first = 0
        for table, vocab in zip(self.embedding, c.vocab_sizes, strict=True):
            yield "embedding", (slice(first, first + vocab),), table.weight, False
            first += vocab
        yield "star_shared_weight", (), self.shared_weight, False
        yield "star_shared_bias", (), self.shared_bias, False
        for d in range(c.num_domains):
            yield "star_weight", (d,), self.slot_weight[d], False
            yield "star_bias", (d,), self.slot_bias[d], False
        star_out, star_norm, _ = self.star_mlp
        yield "star_out_weight", (), star_out.weight, True
        yield "star_out_bias", (), star_out.bias, False
        yield "star_gain", (), star_norm.weight, False
        yield "star_offset", (), star_norm.bias, False
        yield from self.skip.slots("skip", ())
        for e, expert in enumerate((*self.shared_expert, *self.domain_expert, *self.task_expert)):
            for level, layer in enumerate(expert):
                yield from layer.slots("expert", (e,), f".{level}")
        for t in range(c.num_tasks):
            for d in range(c.num_domains):
                pair = t * c.num_domains + d
                yield "gate_weight", (d, t), self.gate[pair][0].weight, True
                yield "gate_bias", (d, t), self.gate[pair][0].bias, False
                hidden, head = self.tower[pair]
                yield from hidden.slots("tower", (d, t))
                yield "head_weight", (d, t, slice(None)), head.weight, False
                yield "head_bias", (d, t), head.bias, False
        for name in ("alpha_domain", "alpha_task", "beta_domain", "beta_task"):
            yield name, (), getattr(self, name), False


def _balance(z: list[Tensor], own: int, beta: Tensor) -> Tensor:
    """beta z_own + (1 - beta) / (N - 1) sum of the others; N = 1: beta z_own."""
    mixed = beta * z[own]
    for other, value in enumerate(z):
        if other != own:
            mixed = mixed + (1 - beta) / (len(z) - 1) * value
    return mixed
