"""Sharding: of every role's network each process keeps a part, of its weights, gradients and momenta (FSDP2).

The units of a network (:mod:`fewstep.training.divide`) are put together for their calls and taken apart again, forward
and backward. A role goes on as it is: its parameters are DTensors now, and what a backward pass goes to are the whole
ones that come and go. Modules that a role owns beside its network (a GAN head, a second time) and parameters that
several units share stay whole on every process, as does what of the network is no parameter.

Averages move without communication: every process has the same part of both sides.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fewstep.errors import UserError
from fewstep.networks.roles import NetworkRole, Role
from fewstep.training import checkpoint, shard_files
from fewstep.training.distributed import sum_over_processes
from fewstep.training.divide import divide, tied, watch
from fewstep.training.held import Held, Holding

_CPU = torch.device("cpu")


def open_mesh(device: str, processes: int, group: int | None = None) -> DeviceMesh:
    """The processes of a launch, in order: groups of ``group``, each with one copy of everything; default one group.

    Raises:
        UserError: they are no whole number of groups, or this torch is too old.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UserError(f"--sharding needs torch 2.13 or newer, and this is {torch.__version__}; leave it out")
    if group is None:
        return init_device_mesh(device, (processes,), mesh_dim_names=("part",))
    if processes % group:
        raise UserError(f"{processes} processes are no whole number of groups of --sharding_group {group}")
    return init_device_mesh(device, (processes // group, group), mesh_dim_names=("copy", "part"))


class Sharding(Holding):
    """The processes of a run as a mesh, and the roles that lie on it.

    Args:
        mesh: from :func:`open_mesh`.
        offload: parts, their gradients and momenta lie in the memory of the CPU.
    """

    together = True

    def __init__(self, mesh: DeviceMesh, offload: bool = False) -> None:
        self.mesh = mesh
        self._policy = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
        self._leaves: dict[int, Tensor] = {}
        self._units: list[FSDPModule] = []

    @torch.no_grad()
    def shard(self, roles: Sequence[Role], probe: Callable[[NetworkRole], Any]) -> None:
        """Divide the networks of all roles; what nobody else holds of them is freed.

        Args:
            roles: of a run, whole and alike on every process; no optimizer knows them yet.
            probe: runs a role's network once.
        """
        networks: set[nn.Module] = set()
        for own in (own for role in roles for own in role.experts.values()):
            network = own.denoiser.network
            own.denoiser.without_gradient = None  # a merged form is of whole weights
            if network not in networks:
                networks.add(network)
                self._shard(network, partial(probe, own))
        gc.collect()

    def _shard(self, network: nn.Module, run: Callable[[], Any]) -> None:
        names = divide(network, watch(network, run))
        whole = set(tied(network, names))
        for name in names:
            unit = network.get_submodule(name)
            # Before FSDP's own hook, which a view would lose where it is changed in place.
            unit.register_forward_hook(_no_views)
            fully_shard(
                unit, mesh=self.mesh, reshard_after_forward=True, offload_policy=self._policy, ignored_params=whole
            )
            assert isinstance(unit, FSDPModule)
            # The loop has divided by the number of processes already.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            self._units.append(unit)
        network.register_forward_hook(_end_early, always_call=True)
        for name in names:
            unit = network.get_submodule(name)
            assert isinstance(unit, FSDPModule)
            parts = {key: p for key, p in unit.named_parameters() if isinstance(p, DTensor)}
            unit.unshard()
            leaves = {key: p for key, p in unit.named_parameters() if key in parts and not isinstance(p, DTensor)}
            self._leaves |= {id(parts[key]): leaf for key, leaf in leaves.items()}
            unit.reshard()

    def held(self, role: Role) -> Held:
        return _HeldInPart(role, self._leaves, self.mesh)

    def here(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save(
        self, folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int
    ) -> None:
        like = {stem: values for stem, values in tensors.items() if f"{stem}_optimizer" in tensors}
        for stem, weights in like.items():
            momenta = tensors[f"{stem}_optimizer"]
            tensors[f"{stem}_optimizer"] = {
                key: _as_part(value, weights.get(key.rpartition("/")[0])) for key, value in momenta.items()
            }
        if dist.get_rank() == 0:
            with checkpoint.written(folder, step, state | {"sharded": list(tensors)}, keep) as unfinished:
                _write_together(unfinished, tensors)
        else:
            _write_together(None, tensors)

    def tensors(self, found: checkpoint.Found, roles: dict[str, Role]) -> dict[str, dict[str, Tensor]]:
        weights = {name: role.state_dict() for name, role in roles.items()}

        def like(stem: str, name: str, shape: torch.Size) -> DTensor | None:
            of, is_momentum = stem.removesuffix("_optimizer"), stem.endswith("_optimizer")
            own = weights.get(of, {}).get(name.rpartition("/")[0] if is_momentum else name)
            return own if isinstance(own, DTensor) and own.shape == shape else None

        def empty(stem: str, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            own = like(stem, name, shape)
            return torch.zeros(shape, dtype=dtype) if own is None else torch.zeros_like(own, dtype=dtype)

        def part(stem: str, name: str, value: Tensor) -> Tensor:
            own = like(stem, name, value.shape)
            if own is None:
                return value
            divided = distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None).to_local()
            return _with_part(own, divided.to(own.to_local().device))

        if found.sharded is not None:
            tensors = shard_files.read(found.folder, found.sharded, empty)
        else:
            whole = found.tensors()
            tensors = {stem: {n: part(stem, n, v) for n, v in values.items()} for stem, values in whole.items()}
        for stem in (stem for stem in tensors if stem.endswith("_optimizer")):
            tensors[stem] = {name: self.here(value) for name, value in tensors[stem].items()}
        return tensors

    # --- whole networks -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def whole(self, parameter: Tensor) -> Tensor:
        """All of a parameter; every process calls this."""
        if not isinstance(parameter, DTensor):
            return parameter.detach()
        part = parameter.to_local().to(_device_of(self.mesh))  # where the processes meet, though it lies elsewhere
        return _with_part(parameter, part).full_tensor()

    @torch.no_grad()
    def gather(self, role: Role, onto: Role, device: torch.device | str, main: bool) -> None:
        """Put the parameters of a role, one after the other, whole into another one; every process calls this.

        Args:
            role: on the mesh.
            onto: from :func:`shell_of`.
            device: where the whole ones go.
            main: whether they are kept on this process.
        """
        for unit in self._units:
            unit.reshard()
        made: dict[int, nn.Parameter] = {}
        for name, parameter in role.weights.named_parameters(remove_duplicate=False):
            if id(parameter) not in made:
                whole = self.whole(parameter)
                made[id(parameter)] = nn.Parameter(whole.to(device), requires_grad=False) if main else parameter
            if main:
                module, _, own = name.rpartition(".")
                onto.weights.get_submodule(module).register_parameter(own, made[id(parameter)])


def shell_of(role: Role, *shared: nn.Module) -> Role:
    """The same role without its weights, to be made before they are divided; it has the role's own added modules.

    Args:
        role: whole.
        *shared: networks that it refers to and that are not copied.
    """
    kept: list[Any] = [*role.added.values(), *shared, *(b for m in role.modules.values() for b in m.buffers())]
    kept += [part for own in role.experts.values() for part in (own.denoiser.recipe, own.denoiser.schedule)]
    known: dict[int, Any] = {id(part): part for part in kept}
    for own in role.experts.values():
        for parameter in own.denoiser.network.parameters():
            known[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return copy.deepcopy(role, known)


class _HeldInPart(Held):
    """Parameters of which this process holds a part; what is no DTensor it holds whole."""

    def __init__(self, role: Role, leaves: dict[int, Tensor], mesh: DeviceMesh) -> None:
        super().__init__(role)
        self._parameters = self.leaves
        self._group, self._device = mesh.get_group(mesh.ndim - 1), _device_of(mesh)
        self.leaves = [leaves.get(id(p), p) for p in self._parameters]
        self.own = [p.to_local().detach() if isinstance(p, DTensor) else p for p in self._parameters]

    def reduce(self) -> list[Tensor]:
        for parameter, own in zip(self._parameters, self.own, strict=True):
            if isinstance(parameter, DTensor):  # summed in the backward pass
                own.grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else None
                parameter.grad = None
        sum_over_processes(own.grad for own in self._whole() if own.grad is not None)
        return [own.grad for own in self.own if own.grad is not None]

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        whole = {id(own.grad) for own in self._whole()}
        squares = [torch.zeros((), device=self._device) for _ in range(2)]
        for gradient in gradients:
            squares[id(gradient) in whole] += torch.linalg.vector_norm(gradient).square().to(self._device)
        dist.all_reduce(squares[False], group=self._group)
        return (squares[False] + squares[True]).sqrt()

    @property
    def device(self) -> torch.device:
        return self._device

    def _whole(self) -> Iterator[Tensor]:
        return (own for own, p in zip(self.own, self._parameters, strict=True) if not isinstance(p, DTensor))


def _as_part(value: Tensor, like: Tensor | None) -> Tensor:
    """A part of a parameter's momentum, told of what it is a part."""
    if not isinstance(like, DTensor) or value.shape != like.to_local().shape:
        return value
    return _with_part(like, value)


def _with_part(like: DTensor, part: Tensor) -> DTensor:
    """A tensor that is divided as another one, of which this is the part here."""
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def _device_of(mesh: DeviceMesh) -> torch.device:
    """This process's device on a mesh."""
    return torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else _CPU


def _write_together(folder: Path | None, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write the files of a checkpoint into the main process's ``folder``."""
    told: list[Any] = [folder]
    dist.broadcast_object_list(told)
    shard_files.write(told[0], tensors)


def _no_views(_unit: nn.Module, _args: Any, output: Any) -> Any:
    """What a unit returns is its own: what is put on a view is lost where the view is changed in place."""
    return output.clone() if isinstance(output, Tensor) and output.requires_grad and output._base is not None else None


def _end_early(network: nn.Module, _args: Any, output: Any) -> None:
    """A pass that ended at a tap leaves the network as one that ended by itself: for the next pass to begin."""
    if output is None:
        assert isinstance(network, FSDPModule)
        network.reset_iter_state()
